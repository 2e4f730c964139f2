//! Ways to the same end: what is computed once, kept or shared changes no bit.

use super::support::{Left, Workshop};

#[test]
fn stage_two_from_the_activations_of_stage_one_is_stage_two_alone() {
    let workshop = Workshop::new(22);
    let tuned = ["--epochs", "2", "--shuffle", "--lora-dropout", "0.1"];
    workshop.train("both", &tuned);
    workshop.train("one", &["--stage", "sae", "--shuffle"]);
    let alone = [&tuned[..], &["--stage", "sft", "--sae", "one/sae"]].concat();
    workshop.train("two", &alone);
    let (both, one, two) = (
        Left::by(&workshop.path("both")),
        Left::by(&workshop.path("one")),
        Left::by(&workshop.path("two")),
    );
    assert_eq!(both.metrics, [one.metrics, two.metrics].concat());
    for (name, bytes) in one.files.iter().chain(&two.files) {
        assert!(both.files[name] == *bytes, "{}", name.display());
    }
    assert_eq!(both.files.len(), one.files.len() + two.files.len());
}

#[test]
fn activations_in_memory_on_disk_or_computed_again_give_the_same_bits() {
    let workshop = Workshop::new(22);
    let settings = ["--epochs", "2", "--sae-epochs", "2"];
    workshop.train("memory", &settings);
    let disk = [&settings[..], &["--cache-memory", "0"]].concat();
    workshop.train("disk", &disk);
    let memory = Left::by(&workshop.path("memory"));
    memory.assert_same(&Left::by(&workshop.path("disk")), "on disk");
}
