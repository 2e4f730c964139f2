//! Whole runs on CUDA: on a GPU where there is one, else on the emulator.

use std::sync::OnceLock;

use resa_engine::device::CudaDevice;
use serde_json::Value;

use super::support::{Left, Workshop, metrics, run};

/// Five steps of each stage; the last two of Stage II take their inputs from the cache. With so
/// few latents signum's default rate is so high that the sign of a gradient near zero decides the
/// next losses, and with it the last bit of an activation: a smaller one lets devices be compared.
const SETTINGS: &str = "sae-lr = 0.0005\nlr = 0.0001\nmax-sae-steps = 5\nmax-sft-steps = 5\nepochs = 2\nseq-len = 72\n\
    grad-accum = 2\nlora-dropout = 0.1\nshuffle = true\ncheckpoint-every = 100";

/// Whether there is something to run kernels on; says so where there is not.
pub fn cuda_is_there() -> bool {
    cuda_emulator::install().unwrap();
    let there = CudaDevice::is_available();
    if !there {
        println!("skipped: built without nvcc");
    }
    there
}

fn on(device: &str) -> String {
    format!("{SETTINGS}\ndevice = '{device}'")
}

/// Each step's measurements must be near each other: bf16 keeps 8 bits, and what a step reports
/// comes after a few dozen operators that each round to them.
fn assert_near(got: &[Value], want: &[Value], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (got, want) in got.iter().zip(want) {
        for (field, tolerance) in [
            ("fvu", 0.01),
            ("fvu_no_sinks", 0.01),
            ("kl", 0.03),
            ("sae_mse", 0.02),
            // The most sensitive: with the CPU's own bf16 products it is up to 3.2 % off here.
            ("grad_norm", 0.05),
        ] {
            let (Some(g), Some(w)) = (got[field].as_f64(), want[field].as_f64()) else {
                assert_eq!(got[field], want[field], "{what}: {field}");
                continue;
            };
            let step = &want["step"];
            assert!(
                (g / w - 1.0).abs() < tolerance,
                "{what}, step {step}: {field} is {g}, on the CPU {w}"
            );
        }
    }
}

/// What is left by a run that nothing stops, on the CPU and on CUDA.
struct LeftAlone {
    cpu: Left,
    cuda: Left,
}

/// Once for all tests; `None` where there is no CUDA.
fn left_alone() -> Option<&'static LeftAlone> {
    static LEFT: OnceLock<Option<LeftAlone>> = OnceLock::new();
    let left = LEFT.get_or_init(|| {
        if !cuda_is_there() {
            return None;
        }
        let workshop = Workshop::new(60);
        let [cpu, cuda] = ["cpu", "cuda"].map(|device| {
            run(&workshop.config(device, &on(device)), false, None).unwrap();
            Left::by(&workshop.path(device))
        });
        Some(LeftAlone { cpu, cuda })
    });
    left.as_ref()
}

#[test]
fn five_steps_of_both_stages_on_cuda_measure_what_the_cpu_does() {
    let Some(LeftAlone { cpu, cuda }) = left_alone() else {
        return;
    };
    assert_eq!(cpu.metrics.len(), 10);
    assert_near(&cuda.metrics, &cpu.metrics, "cuda");
}

#[test]
fn a_run_stopped_on_cuda_goes_on_to_the_same_bits() {
    let Some(alone) = left_alone() else { return };
    let workshop = Workshop::new(60);
    // At the end of Stage I, and within Stage II.
    for stop in [5, 8] {
        let config = workshop.config(&format!("stopped-{stop}"), &on("cuda"));
        run(&config, false, Some(stop)).unwrap();
        run(&config, true, None).unwrap();
        let what = format!("stopped after step {stop}");
        alone.cuda.assert_same(&Left::by(&config.out), &what);
    }
}

#[test]
fn a_run_started_on_one_device_goes_on_on_the_other() {
    let Some(alone) = left_alone() else { return };
    let workshop = Workshop::new(60);
    for (first, second) in [("cpu", "cuda"), ("cuda", "cpu")] {
        let out = format!("{first}-{second}");
        run(&workshop.config(&out, &on(first)), false, Some(7)).unwrap();
        run(&workshop.config(&out, &on(second)), true, None).unwrap();
        assert_near(&metrics(&workshop.path(&out)), &alone.cpu.metrics, &out);
    }
}
