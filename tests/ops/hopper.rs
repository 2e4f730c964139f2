//! Compute capability 9.0, whose products and attention run on kernels of their own: the
//! operators' tests once more in a process that emulates a Hopper, and equal bits whatever the
//! order of its warps.

use std::process::Command;

use cuda_emulator::Backend;
use resa_engine::ops::flash_attention::FlashAttention;
use resa_engine::ops::gemm::Linear;
use resa_engine::ops::lora::{Dropout, Frozen, LoraLinear};
use resa_engine::ops::sparse_decode::SharedGroups;
use resa_engine::ops::topk::TopK;
use resa_engine::rng::{Purpose, Stream};

use crate::harness::{cuda, random, round_bf16, run};
use crate::topk::encoder_inputs;

/// What sets the emulated device.
const DEVICE: &str = "CUDA_EMU_DEVICE";

/// What sets the order of its warps.
const SCHEDULE: &str = "CUDA_EMU_SCHEDULE";

/// The output of this binary's tests `tests` on an emulated Hopper whose warps run in order or, with
/// a seed as `schedule`, at random; they must pass. `None` where a real GPU, or one that the caller
/// has chosen, runs them as it is.
fn on_hopper(tests: &[&str], schedule: Option<&str>) -> Option<String> {
    let emulated = cuda().is_some() && cuda_emulator::install() == Ok(Backend::Emulator);
    if !emulated || std::env::var_os(DEVICE).is_some() {
        return None;
    }
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(tests).arg("--nocapture").env(DEVICE, "h100");
    child.env_remove(SCHEDULE);
    child.envs(schedule.map(|seed| (SCHEDULE, seed)));
    let output = child.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{tests:?}: {text}{errors}");
    assert!(!text.contains(" 0 passed"), "no test ran: {text}");
    Some(text)
}

#[test]
fn operators_with_kernels_for_hopper_pass_their_tests_on_it() {
    let tests = ["gemm::", "lora::", "flash_attention::", "topk::"];
    on_hopper(&tests, std::env::var(SCHEDULE).ok().as_deref());
}

/// A hash (FNV-1a) of the bits of the outputs and gradients of a linear layer, an adapted one,
/// attention and an SAE's encoder.
fn bits_of_products() -> Option<u64> {
    let device = cuda()?;
    let attention = FlashAttention {
        batch: 1,
        seq_len: 200,
        heads: 4,
        kv_heads: 2,
        head_dim: 64,
        doc_starts: None,
    };
    let inputs = [(7, 256), (8, 128), (9, 128)].map(|(seed, n)| random(seed, &[200, n], 2.0));
    let attended = run(device, attention, &inputs, &[random(10, &[200, 256], 1.0)]);
    let (t, k, n, r) = (264, 224, 136, 8);
    let weight = round_bf16(&random(1, &[n, k], 1.0));
    let bias = Some(round_bf16(&random(2, &[n], 1.0)));
    let [x, dy] = [random(3, &[t, k], 1.0), random(4, &[t, n], 1.0)];
    let linear = Linear {
        weight: weight.clone(),
        bias: bias.clone(),
    };
    let inputs = [x.clone()];
    let plain = run(device, linear, &inputs, std::slice::from_ref(&dy));
    let dropout = Dropout {
        p: 0.3,
        stream: Stream::new(9, Purpose::Dropout, 2, 11),
        step: None,
    };
    let module = Frozen {
        weight,
        bias,
        dropout: Some(dropout),
    };
    let adapted = LoraLinear {
        modules: vec![module],
        scale: 1.5,
    };
    let inputs = [x, random(5, &[r, k], 1.0), random(6, &[n, r], 1.0)];
    let adapted = run(device, adapted, &inputs, &[dy]);
    // Latents for two tiles beside those that go first, tokens for two clusters.
    let (t, d, m, k) = (264, 136, 640, 8);
    let inputs = encoder_inputs(11, [t, d, m], [1.0; 4]);
    let encoder = TopK::new(k, SharedGroups::default());
    let encoded = run(device, encoder, &inputs, &[random(15, &[t, k], 1.0)]);
    let all = [plain, adapted, attended, encoded]
        .map(|(outputs, gradients)| [outputs, gradients].concat());
    let all = all.concat().concat();
    let mix = |hash: u64, bits: u32| (hash ^ u64::from(bits)).wrapping_mul(0x0100_0000_01b3);
    Some(all.into_iter().fold(0xcbf2_9ce4_8422_2325, mix))
}

#[test]
fn products_have_the_same_bits_under_every_schedule_and_run_on_wgmma() {
    const NAME: &str = "hopper::products_have_the_same_bits_under_every_schedule_and_run_on_wgmma";
    if std::env::var(DEVICE).is_ok_and(|d| d == "h100") {
        let Some(bits) = bits_of_products() else {
            return;
        };
        println!("bits {bits:x}");
        let totals = cuda_emulator::emulator().unwrap().totals();
        for kernel in [
            "gemm_nt_wgmma_128x128",
            "gemm_nn_wgmma_128x128",
            "gemm_nn_masked_wgmma_128x192",
            "topk_extend_lists_wgmma_128x192",
            "flash_attention_forward_wgmma_bf16_d64",
            "flash_attention_backward_wgmma_bf16_d64",
        ] {
            assert!(totals.contains(kernel), "{kernel} was not launched");
        }
        return;
    }
    let bits = |schedule| {
        let text = on_hopper(&["--exact", NAME], schedule)?;
        let line = text.lines().find(|line| line.contains("bits "));
        Some(line.expect("the child prints its bits").to_owned())
    };
    let fixed = bits(None);
    for seed in ["1", "2", "3"] {
        assert_eq!(bits(Some(seed)), fixed, "seed {seed}");
    }
}
