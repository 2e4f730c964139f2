//! An interrupted run goes on to the same bits.

use super::support::{Left, Workshop, fixture, run, stderr};

/// What is varied, and the steps (of both stages together) after which the run is stopped.
struct Case {
    what: &'static str,
    toml: &'static str,
    stops: &'static [usize],
}

const CASES: &[Case] = &[
    Case {
        what: "shuffled epochs, caches in memory, gradients accumulated, dropout",
        toml: "shuffle = true\nsae-epochs = 2\nepochs = 3\ngrad-accum = 2\nlora-dropout = 0.1\n\
               source = 'SOURCE'",
        stops: &[1, 8, 12, 14, 19, 23],
    },
    Case {
        what: "source and target the same, caches on disk",
        toml: "shuffle = true\nsae-epochs = 2\nepochs = 2\ncache-memory = 0.0\nlora-dropout = 0.1",
        stops: &[5, 9, 13, 20, 24],
    },
    Case {
        what: "source and target the same, one epoch each, in the file's order",
        toml: "checkpoint-every = 100",
        stops: &[4, 6, 8],
    },
    Case {
        what: "adam, multi-topk and auxk",
        toml: "stage = 'sae'\nsae-optimizer = 'adam'\nmulti-topk = true\nauxk-alpha = 0.1\n\
               sae-epochs = 2",
        stops: &[2, 7],
    },
    Case {
        what: "gradients through the SAE",
        toml: "sae-grad = 'through'\nepochs = 2\nshuffle = true",
        stops: &[7, 9, 17],
    },
    Case {
        what: "the supervised baseline with a document mask",
        toml: "method = 'sft'\nepochs = 2\nlora-dropout = 0.1\nshuffle = true\n\
               document-mask = true",
        stops: &[2, 9],
    },
    Case {
        what: "the supervised baseline on sequences of which some hold no part of an answer",
        toml: "method = 'sft'\nseq-len = 8\nsft-batch = 1\ngrad-accum = 2\nmax-sft-steps = 8",
        stops: &[3],
    },
    Case {
        what: "several hookpoints without sink tokens",
        toml: "stage = 'sae'\nlayer = [4, 1, 2]\nsae-epochs = 2\nexclude-sinks = true",
        stops: &[3, 8],
    },
];

#[test]
fn a_run_stopped_after_any_step_ends_with_the_bits_of_one_left_alone() {
    for case in CASES {
        let workshop = Workshop::new(22);
        let source = fixture("example/source");
        let toml = case.toml.replace("SOURCE", source.to_str().unwrap());
        run(&workshop.config("alone", &toml), false, None).unwrap();
        let alone = Left::by(&workshop.path("alone"));
        for stop in case.stops {
            let out = format!("stopped-{stop}");
            run(&workshop.config(&out, &toml), false, Some(*stop)).unwrap();
            // All settings come from the run folder.
            let output = workshop.resa(&["train", "--resume", "--out", &out]);
            let what = format!("{}, stopped after step {stop}", case.what);
            assert!(output.status.success(), "{what}: {}", stderr(&output));
            alone.assert_same(&Left::by(&workshop.path(&out)), &what);
        }
    }
}

#[test]
fn a_run_stopped_and_resumed_at_every_step_ends_with_the_same_bits() {
    let workshop = Workshop::new(22);
    let toml = "shuffle = true\nepochs = 2\nlora-dropout = 0.1\ncheckpoint-every = 100";
    run(&workshop.config("alone", toml), false, None).unwrap();
    let config = workshop.config("stopped", toml);
    run(&config, false, Some(1)).unwrap();
    let steps = super::support::metrics(&workshop.path("alone")).len();
    for _ in 2..=steps {
        run(&config, true, Some(1)).unwrap();
    }
    run(&config, true, None).unwrap();
    let stopped = Left::by(&workshop.path("stopped"));
    Left::by(&workshop.path("alone")).assert_same(&stopped, "stopped at every step");
}

/// Files without a name, made in `dir`, that this process has open.
#[cfg(target_os = "linux")]
fn nameless_files(dir: &std::path::Path) -> usize {
    let open = std::fs::read_dir("/proc/self/fd").unwrap();
    let files = open.filter_map(|file| std::fs::read_link(file.ok()?.path()).ok());
    files
        .filter(|file| file.starts_with(dir) && !file.exists())
        .count()
}

#[cfg(target_os = "linux")]
#[test]
fn activations_of_stage_one_go_when_stage_two_has_its_own_also_after_a_resume() {
    use resa_engine::train::{self, CancelFlag, Event, RunOptions, StepStage};
    let workshop = Workshop::new(22);
    let config = workshop.config("run", "cache-memory = 0.0\nepochs = 3");
    let mut counts = Vec::new();
    for resume in [false, true] {
        let cancel = CancelFlag::new();
        let mut observer = |event: &Event| {
            if let Event::Step(m) = event
                && m.stage == StepStage::Sft
            {
                counts.push(nameless_files(&config.out.canonicalize().unwrap()));
                if m.epoch > 1.5 && !resume {
                    cancel.cancel();
                }
            }
        };
        let result = train::run(&config, RunOptions { resume }, &mut observer, &cancel);
        assert_eq!(result.is_ok(), resume);
        // Both at first, then one.
        assert_eq!((counts[0], counts.last()), (2, Some(&1)));
        counts.clear();
    }
}
