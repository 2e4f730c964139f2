//! Ways to the same end: what is computed once, kept or shared changes no bit.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use safetensors::SafeTensors;
use serde_json::json;

use super::support::{Left, Workshop, copy_dir, edit_json, metrics, run};

#[test]
fn stage_two_from_the_activations_of_stage_one_is_stage_two_alone() {
    let workshop = Workshop::new(22);
    let tuned = ["--epochs", "2", "--shuffle", "--lora-dropout", "0.1"];
    workshop.train("both", &tuned);
    workshop.train("one", &["--stage", "sae", "--shuffle"]);
    // Stage II does not look at the source.
    let stage = ["--stage", "sft", "--sae", "one/sae", "--source", "absent"];
    let alone = [&tuned[..], &stage].concat();
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
fn activations_in_memory_or_on_disk_give_the_same_bits() {
    let workshop = Workshop::new(22);
    let settings = ["--epochs", "2", "--sae-epochs", "2"];
    workshop.train("memory", &settings);
    let disk = [&settings[..], &["--cache-memory", "0"]].concat();
    workshop.train("disk", &disk);
    let memory = Left::by(&workshop.path("memory"));
    memory.assert_same(&Left::by(&workshop.path("disk")), "on disk");
}

/// The tensors of an adapter by name.
fn adapter(run: &Path) -> BTreeMap<String, Vec<u8>> {
    let bytes = fs::read(run.join("adapter/adapter_model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensors = file.iter();
    tensors
        .map(|(name, view)| (name.to_owned(), view.data().to_vec()))
        .collect()
}

fn is_early(name: &str) -> bool {
    (0..=2).any(|layer| name.contains(&format!(".layers.{layer}.")))
}

#[test]
fn adapters_that_act_before_the_sae_change_the_student_alone_and_stay_as_they_are() {
    let workshop = Workshop::new(22);
    let baseline = ["--method", "sft", "--epochs", "1", "--lr", "0.01"];
    workshop.train("start", &baseline);
    // The same adapter, with those up to the SAE's layer taken off.
    copy_dir(&workshop.path("start/adapter"), &workshop.path("late"));
    let file = workshop.path("late/adapter_model.safetensors");
    let bytes = fs::read(&file).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let late = tensors.iter().filter(|(name, _)| !is_early(name));
    fs::write(&file, safetensors::serialize(late, None).unwrap()).unwrap();
    edit_json(&workshop.path("late/adapter_config.json"), |json| {
        json["layers_to_transform"] = json!([3, 4, 5]);
    });

    let settings = "shuffle = true\nepochs = 3\nlora-dropout = 0.1\nmax-sae-steps = 3\n";
    let config = |out: &str, adapter: &str| {
        let path = workshop.path(adapter);
        let toml = format!("{settings}adapter = '{}'", path.display());
        workshop.config(out, &toml)
    };
    run(&config("all", "start/adapter"), false, None).unwrap();
    run(&config("cut", "late"), false, None).unwrap();
    let steps = |out: &str| {
        let mut lines = metrics(&workshop.path(out));
        lines.retain(|line| line["stage"] == "sft");
        lines
    };
    let (all, cut) = (&steps("all")[0], &steps("cut")[0]);
    assert_eq!(all["sae_mse"], cut["sae_mse"], "the teacher has no adapter");
    let [all_kl, cut_kl] = [all, cut].map(|line| line["kl"].as_f64().unwrap());
    assert!(
        (all_kl / cut_kl - 1.0).abs() > 1e-3,
        "{all_kl} and {cut_kl}"
    );

    let (before, after) = (
        adapter(&workshop.path("start")),
        adapter(&workshop.path("all")),
    );
    for (name, bytes) in &before {
        let changed = after[name] != *bytes;
        assert_eq!(changed, !is_early(name), "{name}");
    }
    // Stopped in a later epoch, a run computes again what the other one took from its cache.
    let later = 3 + steps("all").len() / 3 + 2;
    run(&config("again", "start/adapter"), false, Some(later)).unwrap();
    workshop.prints(&["train", "--resume", "--out", "again"]);
    let again = Left::by(&workshop.path("again"));
    Left::by(&workshop.path("all")).assert_same(&again, "computed again");
}
