//! Steps that are recorded on a GPU beside steps that go launch by launch.

use super::*;
use crate::device::CudaDevice;
use crate::model::{Layout, LoraConfig};
use crate::tape::{Tape, Var};
use crate::train::testing::{config, model, random};

const SEQ_LEN: usize = 24;
/// The first layer that is trained.
const FIRST: usize = 1;

fn device() -> Option<Device> {
    CudaDevice::for_tests(1).map(Device::Cuda)
}

fn reserved(device: &Device) -> usize {
    match device {
        Device::Cuda(cuda) => cuda.reserved_memory(),
        Device::Cpu(_) => 0,
    }
}

fn uploaded(device: &Device) -> Qwen2 {
    let mut model = model();
    if let Device::Cuda(cuda) = device {
        model.upload(cuda, 0..3, true).unwrap();
    }
    model
}

/// Adapters that act, in the rank that the fastest kernels take.
fn lora() -> Lora {
    let settings = LoraConfig {
        r: 8,
        alpha: 16.0,
        dropout: 0.0,
        use_rslora: false,
        targets: Module::ALL.to_vec(),
    };
    let mut lora = Lora::new(settings, &config(), FIRST..3, 5).unwrap();
    for (i, pair) in lora.pairs.values_mut().enumerate() {
        pair.b = random(500 + i as u64, pair.b.shape());
    }
    lora
}

fn options(dropout: f32) -> SftOptions {
    SftOptions {
        lr: 1e-2,
        weight_decay: 0.01,
        clip: 0.5,
        dropout,
        seed: 7,
    }
}

fn micro_batch(layout: &Layout, documents: bool, seed: u64, rows: usize) -> MicroBatch<'static> {
    let shape = [rows * SEQ_LEN, config().hidden_size];
    let starts = (0..rows * SEQ_LEN).map(|t| match t % SEQ_LEN {
        at if at < 3 + rows => 0,
        _ => 3 + rows as u32,
    });
    let starts = Tensor::from_u32(starts.collect(), [shape[0]]).unwrap();
    MicroBatch {
        layout: layout.with_batch(rows, documents.then_some(starts)),
        student: Student::Reconstruction {
            x: random(2 * seed, &shape),
            layer: FIRST - 1,
        },
        target: Target::Teacher {
            hidden: random(2 * seed + 1, &shape),
            batch: rows as f32,
        },
    }
}

/// The same with what a teacher computes on the device beforehand, as a run has it.
fn taught(device: &Device, model: &Qwen2, micro: MicroBatch<'static>) -> MicroBatch<'static> {
    let (Student::Reconstruction { x, .. }, Target::Teacher { batch, .. }) =
        (&micro.student, &micro.target)
    else {
        panic!("of no teacher");
    };
    let layout = micro.layout.clone().on(device).unwrap();
    let mut tape = Tape::new(device);
    let x = Var::constant(device.resident(x).unwrap());
    let x = model.decode(&mut tape, x, FIRST..3, &layout, None).unwrap();
    let hidden = model.final_norm(&mut tape, &x).unwrap().into_value();
    let batch = *batch;
    MicroBatch {
        layout,
        target: Target::Teacher { hidden, batch },
        ..micro
    }
}

/// The rows of the micro-batches of each step: an epoch whose last step is shorter, twice.
const STEPS: [&[usize]; 8] = [
    &[2],
    &[2],
    &[2, 2, 2],
    &[2, 1],
    &[2],
    &[2],
    &[2, 2, 2],
    &[1],
];

/// Loss and norm of a step.
fn step(trainer: &mut SftTrainer, layout: &Layout, documents: bool, step: usize) -> [u64; 2] {
    let rows = STEPS[step];
    let micro = |i: usize| {
        let seed = 10 * step as u64 + i as u64;
        Ok(micro_batch(layout, documents, seed, rows[i]))
    };
    let measured = trainer.step(rows.len(), micro).unwrap();
    [measured.loss.to_bits(), measured.grad_norm.to_bits()]
}

/// Everything that a checkpoint holds.
fn state(trainer: &SftTrainer) -> Vec<(String, Vec<u32>)> {
    let tensors = trainer.tensors().into_iter();
    let bits = tensors.map(|(name, t)| {
        let t = t.to_f32().unwrap();
        (
            name,
            t.f32s().unwrap().iter().map(|v| v.to_bits()).collect(),
        )
    });
    bits.collect()
}

#[test]
fn recorded_steps_reach_the_bits_of_launches_one_by_one_also_when_resumed() {
    let Some(device) = device() else { return };
    let model = uploaded(&device);
    let layout = Layout::new(&model.config, 2, SEQ_LEN).unwrap();
    for (dropout, documents) in [(0.0, true), (0.3, false)] {
        let trainer = || {
            let options = options(dropout);
            SftTrainer::new(&device, &model, lora(), FIRST..3, options).unwrap()
        };
        let [mut recorded, mut eager] = [trainer(), trainer()];
        eager.pass.records = false;
        let mut saved = None;
        let mut measured = Vec::new();
        for i in 0..STEPS.len() {
            let got = step(&mut recorded, &layout, documents, i);
            let want = step(&mut eager, &layout, documents, i);
            assert_eq!(got, want, "step {i}, dropout {dropout}");
            assert_eq!(state(&recorded), state(&eager), "step {i}");
            measured.push(got);
            if i == 3 {
                let host = recorded.tensors().into_iter();
                let host = host.map(|(name, t)| (name, t.to_f32().unwrap()));
                saved = Some(host.collect::<std::collections::BTreeMap<_, _>>());
            }
        }
        let mut resumed = trainer();
        let saved = saved.unwrap();
        resumed.restore(4, |name| Ok(saved[name].clone())).unwrap();
        for (i, want) in measured.iter().enumerate().skip(4) {
            assert_eq!(&step(&mut resumed, &layout, documents, i), want, "step {i}");
        }
        assert_eq!(state(&resumed), state(&recorded));
    }
}

#[test]
fn adapters_that_moved_are_recorded_where_they_are() {
    let Some(device) = device() else { return };
    let model = uploaded(&device);
    let layout = Layout::new(&model.config, 2, SEQ_LEN).unwrap();
    let options = options(0.1);
    let trainer = || SftTrainer::new(&device, &model, lora(), FIRST..3, options).unwrap();
    let [mut recorded, mut eager] = [trainer(), trainer()];
    eager.pass.records = false;
    for i in 0..3 {
        // Whoever holds the adapters keeps them as they were: the step works on copies.
        let held = recorded.lora().clone();
        assert_eq!(
            step(&mut recorded, &layout, false, i),
            step(&mut eager, &layout, false, i)
        );
        drop(held);
        assert_eq!(state(&recorded), state(&eager), "step {i}");
    }
}

#[test]
fn a_divergence_that_is_no_number_is_an_error_and_the_adapters_stay() {
    for device in [Some(Device::cpu(1).unwrap()), device()]
        .into_iter()
        .flatten()
    {
        let model = uploaded(&device);
        let layout = Layout::new(&model.config, 2, SEQ_LEN).unwrap();
        let mut trainer = SftTrainer::new(&device, &model, lora(), FIRST..3, options(0.0)).unwrap();
        let before = state(&trainer);
        let mut micro = micro_batch(&layout, false, 1, 2);
        if let Target::Teacher { hidden, .. } = &mut micro.target {
            hidden.f32s_mut().unwrap()[5] = f32::NAN;
        }
        let mut micro = Some(micro);
        let error = trainer.step(1, |_| Ok(micro.take().unwrap())).unwrap_err();
        assert!(
            error.to_string().contains("KL divergence is NaN"),
            "{error}"
        );
        assert_eq!(state(&trainer), before);
    }
}

#[test]
fn a_steady_step_allocates_nothing_and_hands_the_driver_fifteen_calls_however_many_kernels_it_has()
{
    let Some(device) = device() else { return };
    let model = uploaded(&device);
    let layout = Layout::new(&model.config, 2, SEQ_LEN).unwrap();
    let emulator = cuda_emulator::install() == Ok(cuda_emulator::Backend::Emulator);
    let emulator = emulator.then(|| cuda_emulator::emulator().unwrap());
    let mut steady = Vec::new();
    for records in [true, false] {
        let before = reserved(&device);
        let options = options(0.1);
        let mut trainer = SftTrainer::new(&device, &model, lora(), FIRST..3, options).unwrap();
        trainer.pass.records = records;
        let mut after = Vec::new();
        for seed in 0..4 {
            let micro = taught(&device, &model, micro_batch(&layout, true, seed, 2));
            emulator.inspect(|emulator| emulator.reset());
            let mut micro = Some(micro);
            trainer.step(1, |_| Ok(micro.take().unwrap())).unwrap();
            let count = emulator.map_or(0, cuda_emulator::Emulator::submissions);
            after.push((reserved(&device) - before, count));
        }
        assert_eq!(
            after[2], after[3],
            "bytes and calls of each step: {after:?}"
        );
        steady.push(after[3]);
        drop(trainer);
        device.release_memory();
        // A table of angles is all that is left.
        assert!(reserved(&device) < before + 4096);
    }
    let [recorded, eager] = [steady[0], steady[1]];
    // Four inputs, two graphs, the losses, and clip's and the optimizer's own.
    assert!(recorded.1 <= 15, "{steady:?}");
    // The recording shares no memory with what the teacher computes.
    assert!(4 * recorded.0 <= 5 * eager.0, "{steady:?}");
}

#[test]
fn adapters_of_other_layers_act_unchanged_and_without_dropout() {
    let devices = [Some(Device::cpu(1).unwrap()), device()];
    for device in devices.into_iter().flatten() {
        let model = uploaded(&device);
        let layout = Layout::new(&model.config, 2, SEQ_LEN).unwrap();
        let measured = |lora: Lora, layers, dropout| {
            let mut trainer =
                SftTrainer::new(&device, &model, lora, layers, options(dropout)).unwrap();
            let micro = |_| Ok(micro_batch(&layout, false, 1, 2));
            trainer.step(1, micro).unwrap()
        };
        let [lower, upper, all] = [1..2, 2..3, 1..3].map(|layers| measured(lora(), layers, 0.0));
        assert_eq!((lower.loss, upper.loss), (all.loss, all.loss));
        let norm = lower.grad_norm.hypot(upper.grad_norm);
        assert!((norm / all.grad_norm - 1.0).abs() < 1e-3, "{norm} {all:?}");
        // What is dropped before a B of zeros is nothing.
        let mut idle = lora();
        for ((layer, _), pair) in &mut idle.pairs {
            if *layer == 1 {
                pair.b.f32s_mut().unwrap().fill(0.0);
            }
        }
        let [with, without] = [0.5, 0.0].map(|dropout| measured(idle.clone(), 1..2, dropout));
        assert_eq!(with.loss, without.loss);
    }
}
