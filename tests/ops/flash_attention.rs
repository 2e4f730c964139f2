use cuda_emulator::Counters;
use resa_engine::device::{Device, Precision};
use resa_engine::model::{Layout, Qwen2Config};
use resa_engine::ops::Operator;
use resa_engine::ops::flash_attention::FlashAttention;
use resa_engine::tape::{Tape, Var};
use resa_engine::tensor::Tensor;

use super::harness::{
    check_in_steps, counters, counters_of_all, cuda, devices, random, relative_error, round_bf16,
    to_f64,
};

mod textbook;

use textbook::{textbook, to_bf16};

#[derive(Clone, Copy)]
struct Case {
    batch: usize,
    seq_len: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
}

impl Case {
    fn op(&self, doc_starts: Option<&Tensor>) -> FlashAttention {
        FlashAttention {
            batch: self.batch,
            seq_len: self.seq_len,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            doc_starts: doc_starts.cloned(),
        }
    }

    /// q, k and v with scores large enough for a softmax that is far from uniform.
    fn inputs(&self) -> [Tensor; 3] {
        let rows = self.batch * self.seq_len;
        let kv = [rows, self.kv_heads * self.head_dim];
        [
            random(7, &[rows, self.heads * self.head_dim], 3.0),
            random(8, &kv, 3.0),
            random(9, &kv, 1.0),
        ]
    }

    /// Plain attention in float64, one query at a time.
    fn reference(&self, inputs: &[Vec<f64>], starts: Option<&Tensor>) -> Vec<f64> {
        let (d, group) = (self.head_dim, self.heads / self.kv_heads);
        let starts = starts.map(|s| s.u32s().unwrap());
        let mut o = Vec::with_capacity(inputs[0].len());
        for row in 0..self.batch * self.seq_len {
            let first_row = row / self.seq_len * self.seq_len;
            let first = first_row + starts.map_or(0, |s| s[row] as usize);
            for head in 0..self.heads {
                let q = &inputs[0][(row * self.heads + head) * d..][..d];
                let at = |j: usize| (j * self.kv_heads + head / group) * d;
                let scores = (first..=row).map(|j| {
                    let k = &inputs[1][at(j)..][..d];
                    q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>() / (d as f64).sqrt()
                });
                let scores: Vec<f64> = scores.collect();
                let max = scores.iter().copied().fold(f64::MIN, f64::max);
                let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
                let sum: f64 = weights.iter().sum();
                o.extend((0..d).map(|c| {
                    let values = (first..=row).map(|j| inputs[2][at(j) + c]);
                    values.zip(&weights).map(|(v, w)| v * w / sum).sum::<f64>()
                }));
            }
        }
        o
    }

    fn agrees_with_float64(&self, doc_starts: Option<&Tensor>) {
        check_in_steps(
            || self.op(doc_starts),
            &self.inputs(),
            |inputs| vec![self.reference(inputs, doc_starts)],
            5e-6,
            |inputs, up| {
                let (o, grads) = textbook(*self, inputs, doc_starts, &up[0], to_bf16);
                (vec![o], grads.into())
            },
        );
    }

    /// Every entry of the output and of the gradients is compared.
    fn agrees_with_the_textbook(&self, device: &Device, starts: Option<&Tensor>) {
        let narrow = device.precision() == Precision::Bf16;
        let held = |t: Tensor| if narrow { round_bf16(&t) } else { t };
        let inputs = self.inputs().map(held);
        let inputs64 = inputs.each_ref().map(to_f64);
        let rows = self.batch * self.seq_len;
        let up = held(random(10, &[rows, self.heads * self.head_dim], 1.0));
        let results = |round| textbook(*self, &inputs64, starts, &to_f64(&up), round);
        let ((want_o, want), (plain_o, plain)) = (results(|v| v), results(to_bf16));
        let (o, grads) = run(device, self.op(starts), &inputs, &up);
        let close = |what: &str, got: &Tensor, want: &[f64], plain: &[f64], in_f32: f64| {
            let limit = match narrow {
                true => 2.0 * relative_error(plain, want),
                false => in_f32,
            };
            let error = relative_error(&to_f64(got), want);
            let on = (device.name(), device.precision());
            assert!(
                error <= limit,
                "{what} is off by {error:e} of {limit:e} on {on:?}"
            );
        };
        close("output", &o, &want_o, &plain_o, 2e-6);
        for (i, got) in grads.iter().enumerate() {
            let what = format!("gradient of input {i}");
            close(&what, got, &want[i], &plain[i], 5e-6);
        }
    }
}

/// Every device, and the CPU in bf16.
fn devices_and_narrow_cpus() -> impl Iterator<Item = Device> {
    let narrow = [1, 3].map(|n| Device::cpu(n).unwrap().with_precision(Precision::Bf16));
    devices("flash_attention").into_iter().chain(narrow)
}

fn case(batch: usize, seq_len: usize, heads: usize, kv_heads: usize, head_dim: usize) -> Case {
    Case {
        batch,
        seq_len,
        heads,
        kv_heads,
        head_dim,
    }
}

#[test]
fn odd_shapes_agree_with_float64() {
    for case in [
        case(2, 2, 1, 1, 8),
        case(3, 7, 1, 1, 24),
        case(2, 31, 4, 2, 16),
        case(1, 65, 3, 1, 8),
        case(1, 63, 2, 2, 40),
    ] {
        case.agrees_with_float64(None);
    }
}

#[test]
fn a_row_that_sees_itself_alone_takes_its_value() {
    let case = case(3, 1, 4, 2, 16);
    for device in devices_and_narrow_cpus() {
        let inputs = case.inputs().map(|t| round_bf16(&t));
        let up = round_bf16(&random(10, inputs[0].shape(), 1.0));
        let (o, grads) = run(&device, case.op(None), &inputs, &up);
        let (v, up, o) = (to_f64(&inputs[2]), to_f64(&up), to_f64(&o));
        for (head, o) in o.chunks(16).enumerate() {
            assert_eq!(o, &v[head / 2 * 16..][..16], "on {}", device.name());
        }
        let dv = to_f64(&grads[2]);
        for (head, dv) in dv.chunks(16).enumerate() {
            let pairs = up[head * 32..][..16].iter().zip(&up[head * 32 + 16..]);
            let want: Vec<f64> = pairs.map(|(a, b)| a + b).collect();
            let limit = match device.precision() {
                Precision::F32 => 1e-6,
                Precision::Bf16 => 4e-3,
            };
            assert!(relative_error(dv, &want) < limit);
        }
        for grad in &grads[..2] {
            assert!(to_f64(grad).iter().all(|g| g.abs() < 1e-5));
        }
    }
}

#[test]
fn no_sequences_give_no_rows_on_the_cpu() {
    for precision in [Precision::F32, Precision::Bf16] {
        let device = Device::cpu(2).unwrap().with_precision(precision);
        let case = case(0, 5, 2, 1, 8);
        let (o, grads) = run(
            &device,
            case.op(None),
            &case.inputs(),
            &random(10, &[0, 16], 1.0),
        );
        assert!(o.is_empty() && grads.iter().all(Tensor::is_empty));
    }
}

#[test]
fn head_sizes_below_a_vector_agree_with_float64_on_the_cpu() {
    for case in [
        case(1, 1, 1, 1, 2),
        case(3, 7, 1, 1, 6),
        case(1, 65, 3, 1, 4),
    ] {
        for precision in [Precision::F32, Precision::Bf16] {
            let device = Device::cpu(2).unwrap().with_precision(precision);
            case.agrees_with_the_textbook(&device, None);
        }
    }
}

#[test]
fn a_head_size_without_a_kernel_is_an_error_on_the_gpu() {
    let Some(device) = cuda() else { return };
    for head_dim in [12, 136] {
        let case = case(1, 4, 2, 1, head_dim);
        let inputs = case.inputs();
        let inputs: Vec<&Tensor> = inputs.iter().collect();
        let result = case.op(None).forward(device, &inputs, &[true; 3]);
        let error = result.map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("multiples of 8 up to 128"), "{error}");
        assert!(error.contains(&head_dim.to_string()), "{error}");
    }
}

#[test]
fn a_row_sees_only_its_document() {
    // Documents of 1 to 12 rows; a sequence starts with what is left of one.
    let starts = |position: u32| match position {
        0..5 => 0,
        5 => 5,
        6..18 => 6,
        _ => position - position % 9,
    };
    let case = case(2, 37, 4, 2, 8);
    let starts = (0..74).map(|row| starts(row % 37)).collect();
    let starts = Tensor::from_u32(starts, [74]).unwrap();
    case.agrees_with_float64(Some(&starts));
}

#[test]
fn many_blocks_agree_with_float64() {
    // Around the tiles' sizes: 64 queries, 128 and 256 keys. The last documents begin so late
    // that some rows of a tile see nothing of a block of keys that other rows see.
    // Blocks that own keys are one for a group of heads in the next to last case, for half of one
    // in the last.
    let cases: [(Case, &[u32]); 8] = [
        (case(1, 257, 3, 1, 64), &[]),
        (case(2, 129, 6, 1, 16), &[]),
        (case(1, 383, 2, 2, 32), &[0, 70, 140, 200, 290]),
        (case(1, 130, 9, 3, 128), &[0, 1, 128]),
        (case(1, 345, 2, 1, 16), &[0, 301]),
        (case(1, 200, 2, 2, 64), &[0, 3, 64, 150]),
        (case(24, 5, 16, 8, 128), &[0, 2]),
        (case(12, 6, 32, 8, 64), &[]),
    ];
    for (case, documents) in cases {
        let rows = case.batch * case.seq_len;
        let start_of = |row| {
            let position = (row % case.seq_len) as u32;
            documents.iter().copied().rfind(|&start| start <= position)
        };
        let starts: Option<Vec<u32>> = (0..rows).map(start_of).collect();
        let starts = starts.map(|starts| Tensor::from_u32(starts, [rows]).unwrap());
        for device in devices_and_narrow_cpus() {
            case.agrees_with_the_textbook(&device, starts.as_ref());
        }
    }
}

/// The operator's output, and its gradients for `up` as the gradient of the output.
fn run(
    device: &Device,
    op: FlashAttention,
    inputs: &[Tensor],
    up: &Tensor,
) -> (Tensor, Vec<Tensor>) {
    device.run(|| {
        let inputs: Vec<&Tensor> = inputs.iter().collect();
        let (o, saved) = op.forward(device, &inputs, &[true; 3]).unwrap();
        let grads = vec![Some(up.clone())];
        let grads = op.backward(device, saved, grads, &[true; 3]).unwrap();
        (o[0].clone(), grads.into_iter().flatten().collect())
    })
}

#[test]
fn operands_that_do_not_fit_are_errors() {
    let device = Device::cpu(1).unwrap();
    let apply = |op: FlashAttention, case: Case| {
        let inputs = case.inputs().map(Var::constant);
        let inputs: Vec<&Var> = inputs.iter().collect();
        device.run(|| Tape::new(&device).apply(op, &inputs).map(|_| ()))
    };
    let good = case(1, 4, 2, 1, 8);
    assert!(apply(good.op(None), good).is_ok());
    assert!(apply(case(1, 4, 3, 2, 8).op(None), good).is_err());
    assert!(apply(case(2, 4, 2, 1, 8).op(None), good).is_err());
    assert!(apply(case(1, 0, 2, 1, 8).op(None), case(1, 0, 2, 1, 8)).is_err());
    let later = Tensor::from_u32(vec![0, 0, 3, 3], [4]).unwrap();
    let error = apply(good.op(Some(&later)), good).unwrap_err().to_string();
    assert!(error.contains("row 2"), "{error}");
}

/// How a kernel splits its work: a warp's rows are multiplied with `step` rows of the other side at
/// a time, where one of them sees another; a block of 128 rows reads what its warps meet once.
struct Tiling {
    warp: usize,
    step: usize,
    /// Matrix products, of 2 D FLOP for each pair of a query and a key.
    products: usize,
    /// Bytes besides rows of heads: statistics and parts of sums, read and written.
    others: [usize; 2],
    /// Reads of a tensor of query heads and of key/value heads.
    once: [usize; 2],
    /// Tensors of which rows are read for every tile.
    in_tiles: usize,
    /// Tensors of query heads and of key/value heads that are written.
    written: [usize; 2],
}

impl Tiling {
    /// Pairs of a query and a key of one head that are multiplied.
    fn pairs(&self, seq_len: usize) -> usize {
        let met = |first: usize| (first + self.warp).next_multiple_of(self.step);
        let warps = (0..seq_len).step_by(self.warp);
        warps.map(|first| self.warp * met(first)).sum()
    }

    /// Pairs beside those that see each other, as a ratio.
    fn wasted(&self, seq_len: usize) -> f64 {
        self.pairs(seq_len) as f64 / (seq_len * (seq_len + 1) / 2) as f64
    }
}

/// Counters of forward and of backward with either pass alone; `None` on a real GPU.
fn counters_of(device: &Device, case: Case) -> Option<[Counters; 3]> {
    let inputs = case.inputs();
    let inputs: Vec<&Tensor> = inputs.iter().collect();
    let up = random(10, inputs[0].shape(), 1.0);
    let forward = || {
        case.op(None)
            .forward(device, &inputs, &[true; 3])
            .unwrap()
            .1
    };
    let backward = |saved, needed| {
        counters_of_all(|| {
            let grads = case
                .op(None)
                .backward(device, saved, vec![Some(up.clone())], needed);
            grads.unwrap();
        })
    };
    device.run(|| {
        Some([
            counters(|| drop(forward()))?,
            backward(forward(), &[true, false, false])?,
            backward(forward(), &[false, true, true])?,
        ])
    })
}

#[test]
fn kernels_read_and_multiply_no_more_than_their_tiles_need() {
    let Some(device) = cuda() else { return };
    for head_dim in [64, 128] {
        let case = case(1, 512, 4, 2, head_dim);
        let Some(counted) = counters_of(device, case) else {
            println!("skipped: counters are the emulator's");
            return;
        };
        // On Hopper a warpgroup's rows meet 64 queries or 128 keys at a time, 64 on the diagonal.
        let Device::Cuda(gpu) = device else { return };
        let on_hopper = gpu.name().unwrap().contains("H100");
        let (warp, step, keys_met) = match head_dim {
            _ if on_hopper => (64, 64, 64),
            64 => (32, 32, 64),
            _ => (16, 32, 32),
        };
        let statistics = case.seq_len * case.heads * 4;
        let forward = Tiling {
            warp: if on_hopper { 64 } else { 32 },
            step: keys_met,
            products: 2,
            others: [0, statistics],
            once: [1, 0],
            in_tiles: 2,
            written: [1, 0],
        };
        // Before either pass a kernel reads two tensors and log_sum and writes three statistics.
        let queries = Tiling {
            warp,
            step,
            products: 3,
            others: [3 * statistics, 3 * statistics],
            once: [4, 0],
            in_tiles: 2,
            written: [1, 0],
        };
        // Each of the two heads that read a key/value head has a block of its own, whose sums,
        // of fp32, a last kernel reads. Tiles read statistics as they read rows.
        let (row, rows_met) = (2 * head_dim, 1280);
        let parts = 2 * 2 * 2 * case.kv_heads * case.seq_len * row;
        let keys = Tiling {
            warp,
            step,
            products: 4,
            others: [
                statistics + 3 * 4 * case.heads * rows_met + parts,
                3 * statistics + parts,
            ],
            once: [2, 2 * 2],
            in_tiles: 2,
            written: [0, 2],
        };
        // Tiles of 128 rows meet 128, 256, 384 and 512 rows of the other side.
        for (tiling, counted) in [forward, queries, keys].iter().zip(&counted) {
            let rows = |[of_queries, of_keys]: [usize; 2]| {
                (of_queries * case.heads + of_keys * case.kv_heads) * case.seq_len * row
            };
            let read = rows(tiling.once)
                + tiling.in_tiles * rows_met * case.heads * row
                + tiling.others[0];
            let sectors = |bytes: usize| (bytes / 32) as u64;
            // A random schedule may split a load.
            let beyond = counted.global_load_sectors as f64 / sectors(read) as f64;
            assert!((1.0..1.01).contains(&beyond), "{beyond}");
            let write = rows(tiling.written) + tiling.others[1];
            assert_eq!(counted.global_store_sectors, sectors(write));
            let flop = tiling.pairs(case.seq_len) * case.heads * tiling.products * 2 * head_dim;
            assert_eq!(counted.mma_flop, flop as u64);
            assert!(tiling.wasted(512) < 1.13 && tiling.wasted(4096) < 1.02);
            assert_eq!(counted.shared_bank_conflicts, 0);
            assert_eq!(counted.global_atomics, 0);
        }
    }
}

#[test]
fn documents_that_begin_after_a_token_do_not_reach_the_gpu() {
    let Some(device) = cuda() else { return };
    let config = Qwen2Config {
        vocab_size: 8,
        hidden_size: 8,
        intermediate_size: 8,
        num_hidden_layers: 1,
        num_attention_heads: 1,
        num_key_value_heads: 1,
        head_dim: 8,
        max_position_embeddings: 8,
        rms_norm_eps: 1e-6,
        rope_theta: 10_000.0,
        tie_word_embeddings: true,
        attention_bias: false,
    };
    let layout = Layout::new(&config, 1, 3).unwrap();
    let on = |starts: [u32; 3]| {
        let starts = Tensor::from_u32(starts.to_vec(), [3]).unwrap();
        layout.with_batch(1, Some(starts)).on(device)
    };
    on([0, 1, 1]).unwrap();
    let error = on([0, 2, 1]).unwrap_err().to_string();
    assert!(error.contains("row 1 at or before"), "{error}");
}
