//! Every operator at a small shape, beside the plainest computation of it in float64.

use super::check::{check, f64s, relative_error, values};
use crate::device::Device;
use crate::error::Result;
use crate::ops::cross_entropy::CrossEntropy;
use crate::ops::decode::{Batch, Heads, KvCache, Map, linear};
use crate::ops::embedding::Embedding;
use crate::ops::flash_attention::FlashAttention;
use crate::ops::fvu::Fvu;
use crate::ops::gemm::Linear;
use crate::ops::kl_div::KlDiv;
use crate::ops::lora::{Frozen, LoraLinear};
use crate::ops::rmsnorm::RmsNorm;
use crate::ops::rope::{Rope, RopeTable};
use crate::ops::sample::{self, Filter};
use crate::ops::sparse_decode::{SharedGroups, SparseDecode};
use crate::ops::swiglu::SwiGlu;
use crate::ops::topk::TopK;
use crate::optim::signum::Signum;
use crate::optim::{AdamW, AdamWConfig, Update, clip_grad_norm};
use crate::tensor::Tensor;

/// Runs an operator on a device; the largest relative error of its results.
pub(super) type SelfTest = fn(&Device) -> Result<f64>;

/// Stem and self-test of every operator.
pub(super) const OPERATORS: [(&str, SelfTest); 17] = [
    ("embedding", embedding),
    ("rmsnorm", rmsnorm),
    ("rope", rope),
    ("swiglu", swiglu),
    ("flash_attention", flash_attention),
    ("gemm", gemm),
    ("lora", lora),
    ("topk", topk),
    ("sparse_decode", sparse_decode),
    ("fvu", fvu),
    ("kl_div", kl_div),
    ("cross_entropy", cross_entropy),
    ("decode", decode),
    ("sample", sample),
    ("adamw", adamw),
    ("signum", signum),
    ("clip", clip),
];

/// Tokens, no multiple of any tile.
const TOKENS: usize = 21;

/// X Wᵀ, row by row.
fn product(x: &[f64], w: &[f64], inner: usize) -> Vec<f64> {
    let dot = |x: &[f64], w: &[f64]| x.iter().zip(w).map(|(x, w)| x * w).sum::<f64>();
    let rows = x.chunks(inner);
    rows.flat_map(|x| w.chunks(inner).map(move |w| dot(x, w)))
        .collect()
}

fn log_softmax(row: &[f64]) -> Vec<f64> {
    let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let log_sum = max + row.iter().map(|v| (v - max).exp()).sum::<f64>().ln();
    row.iter().map(|v| v - log_sum).collect()
}

fn embedding(device: &Device) -> Result<f64> {
    let (vocab, d) = (13, 24);
    let ids: Vec<u32> = (0..TOKENS as u32).map(|t| t * 7 % vocab).collect();
    let op = Embedding {
        ids: Tensor::from_u32(ids.clone(), [TOKENS])?,
    };
    let table = values(1, &[vocab as usize, d])?;
    check(device, op, &[table], |inputs| {
        let rows = ids.iter();
        rows.flat_map(|&id| inputs[0][id as usize * d..][..d].to_vec())
            .collect()
    })
}

fn rmsnorm(device: &Device) -> Result<f64> {
    let d = 40;
    let (weight, eps) = (values(1, &[d])?, 1e-6f32);
    let w = f64s(&weight)?;
    let op = RmsNorm { weight, eps };
    check(device, op, &[values(2, &[TOKENS, d])?], |inputs| {
        let rows = inputs[0].chunks(d).flat_map(|row| {
            let square = row.iter().map(|v| v * v).sum::<f64>() / d as f64;
            let rms = (square + f64::from(eps)).sqrt();
            let scaled = row.iter().zip(&w).map(move |(v, w)| v / rms * w);
            scaled.collect::<Vec<_>>()
        });
        rows.collect()
    })
}

fn rope(device: &Device) -> Result<f64> {
    let (heads, dim, theta) = (3, 16, 10_000.0f64);
    let op = Rope {
        seq_len: TOKENS,
        start: 0,
        heads,
        table: RopeTable::new(TOKENS, dim, theta)?,
    };
    let x = values(1, &[TOKENS, heads * dim])?;
    check(device, op, &[x], |inputs| {
        let mut y = inputs[0].clone();
        for (row, head) in y.chunks_mut(dim).enumerate() {
            rotate(head, row / heads, theta);
        }
        y
    })
}

/// Turns a query or key of one head [D] to its position.
fn rotate(head: &mut [f64], position: usize, theta: f64) {
    let dim = head.len();
    let (low, high) = head.split_at_mut(dim / 2);
    for (i, (a, b)) in low.iter_mut().zip(high).enumerate() {
        let angle = position as f64 * theta.powf(-2.0 * i as f64 / dim as f64);
        let (sin, cos) = angle.sin_cos();
        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
    }
}

fn swiglu(device: &Device) -> Result<f64> {
    let shape = [TOKENS, 40];
    let inputs = [values(1, &shape)?, values(2, &shape)?];
    check(device, SwiGlu, &inputs, |inputs| {
        let pairs = inputs[0].iter().zip(&inputs[1]);
        pairs.map(|(g, up)| g / (1.0 + (-g).exp()) * up).collect()
    })
}

/// Softmax attention of one query [D] over the first `n` rows of keys and values, whose head
/// begins at `start` of rows of `stride`.
fn attend(q: &[f64], k: &[f64], v: &[f64], [n, start, stride]: [usize; 3]) -> Vec<f64> {
    let head = |data: &[f64], t: usize| data[t * stride + start..][..q.len()].to_vec();
    let scale = 1.0 / (q.len() as f64).sqrt();
    let score = |t| scale * product(q, &head(k, t), q.len())[0];
    let weights = log_softmax(&(0..n).map(score).collect::<Vec<_>>());
    let mut out = vec![0.0; q.len()];
    for (t, weight) in weights.iter().enumerate() {
        let rows = out.iter_mut().zip(head(v, t));
        rows.for_each(|(o, v)| *o += weight.exp() * v);
    }
    out
}

fn flash_attention(device: &Device) -> Result<f64> {
    let (heads, kv_heads, dim) = (4, 2, 16);
    let op = FlashAttention {
        batch: 1,
        seq_len: TOKENS,
        heads,
        kv_heads,
        head_dim: dim,
        doc_starts: None,
    };
    let inputs = [
        values(1, &[TOKENS, heads * dim])?,
        values(2, &[TOKENS, kv_heads * dim])?,
        values(3, &[TOKENS, kv_heads * dim])?,
    ];
    check(device, op, &inputs, |inputs| {
        let queries = inputs[0].chunks(dim).enumerate();
        let outputs = queries.flat_map(|(i, q)| {
            let (row, group) = (i / heads, i % heads / (heads / kv_heads));
            let place = [row + 1, group * dim, kv_heads * dim];
            attend(q, &inputs[1], &inputs[2], place)
        });
        outputs.collect()
    })
}

fn gemm(device: &Device) -> Result<f64> {
    let (inner, out) = (48, 40);
    let weight = values(1, &[out, inner])?;
    let w = f64s(&weight)?;
    let op = Linear { weight, bias: None };
    check(device, op, &[values(2, &[TOKENS, inner])?], |inputs| {
        product(&inputs[0], &w, inner)
    })
}

fn lora(device: &Device) -> Result<f64> {
    let (inner, out, rank, scale) = (48, 40, 8, 4.0f32);
    let weight = values(1, &[out, inner])?;
    let w = f64s(&weight)?;
    let module = Frozen {
        weight,
        bias: None,
        dropout: None,
    };
    let op = LoraLinear {
        modules: vec![module],
        scale,
    };
    let inputs = [
        values(2, &[TOKENS, inner])?,
        values(3, &[rank, inner])?,
        values(4, &[out, rank])?,
    ];
    check(device, op, &inputs, |inputs| {
        let low = product(&inputs[0], &inputs[1], inner);
        let high = product(&low, &inputs[2], rank);
        let y = product(&inputs[0], &w, inner).into_iter().zip(high);
        y.map(|(y, high)| y + f64::from(scale) * high).collect()
    })
}

fn topk(device: &Device) -> Result<f64> {
    let (d, m, k) = (32, 70, 5);
    let inputs = [
        values(1, &[TOKENS, d])?,
        values(2, &[m, d])?,
        values(3, &[m])?,
        values(4, &[d])?,
    ];
    let op = TopK::new(k, SharedGroups::default());
    check(device, op, &inputs, |inputs| {
        let centred = inputs[0].iter().zip(inputs[3].iter().cycle());
        let centred: Vec<f64> = centred.map(|(x, b)| x - b).collect();
        let rows = product(&centred, &inputs[1], d);
        let kept = rows.chunks(m).flat_map(|row| {
            let value = |i: usize| (row[i] + inputs[2][i]).max(0.0);
            let mut order: Vec<usize> = (0..m).collect();
            // Of equal values the lower latent comes first: the sort is stable.
            order.sort_by(|&a, &b| value(b).total_cmp(&value(a)));
            order.truncate(k);
            order.sort_unstable();
            order.into_iter().map(value).collect::<Vec<_>>()
        });
        kept.collect()
    })
}

fn sparse_decode(device: &Device) -> Result<f64> {
    let (d, m, k) = (40, 31, 4);
    // Different latents for each token: k is less than what a step of 7 takes to come round.
    let indices: Vec<u32> = (0..TOKENS * k).map(|i| (i * 7 % m) as u32).collect();
    let op = SparseDecode {
        indices: Tensor::from_u32(indices.clone(), [TOKENS, k])?,
        groups: SharedGroups::default(),
    };
    let inputs = [
        values(1, &[TOKENS, k])?,
        values(2, &[m, d])?,
        values(3, &[d])?,
    ];
    check(device, op, &inputs, |inputs| {
        let tokens = inputs[0].chunks(k).zip(indices.chunks(k));
        let rows = tokens.flat_map(|(acts, latents)| {
            let mut row = inputs[2].clone();
            for (a, &i) in acts.iter().zip(latents) {
                let w = &inputs[1][i as usize * d..][..d];
                row.iter_mut().zip(w).for_each(|(y, w)| *y += a * w);
            }
            row
        });
        rows.collect()
    })
}

fn fvu(device: &Device) -> Result<f64> {
    let shape = [TOKENS, 40];
    let (x, x_hat) = (values(1, &shape)?, values(2, &shape)?);
    let target = f64s(&x)?;
    let op = device.run(|| Fvu::new(device, &x))?;
    check(device, op, &[x_hat], |inputs| {
        let mean = |c: usize| target.iter().skip(c).step_by(40).sum::<f64>() / TOKENS as f64;
        let means: Vec<f64> = (0..40).map(mean).collect();
        let about = target.iter().zip(means.iter().cycle());
        let variance: f64 = about.map(|(x, m)| (x - m) * (x - m)).sum();
        let off = target.iter().zip(&inputs[0]);
        vec![off.map(|(x, y)| (x - y) * (x - y)).sum::<f64>() / variance]
    })
}

fn kl_div(device: &Device) -> Result<f64> {
    let (d, vocab) = (32, 50);
    let (teacher, head) = (values(1, &[TOKENS, d])?, values(2, &[vocab, d])?);
    let (h, w) = (f64s(&teacher)?, f64s(&head)?);
    let op = KlDiv { teacher, head };
    check(device, op, &[values(3, &[TOKENS, d])?], |inputs| {
        let (p, q) = (product(&h, &w, d), product(&inputs[0], &w, d));
        let rows = p.chunks(vocab).zip(q.chunks(vocab)).map(|(p, q)| {
            let terms = log_softmax(p).into_iter().zip(log_softmax(q));
            terms.map(|(p, q)| p.exp() * (p - q)).sum()
        });
        rows.collect()
    })
}

fn cross_entropy(device: &Device) -> Result<f64> {
    let (d, vocab) = (32, 50);
    let head = values(2, &[vocab, d])?;
    let w = f64s(&head)?;
    // Every third token does not count.
    let target = |t: usize| (!t.is_multiple_of(3)).then_some((t * 11 % vocab) as u32);
    let targets: Vec<Option<u32>> = (0..TOKENS).map(target).collect();
    let op = CrossEntropy {
        targets: targets.clone(),
        head,
    };
    check(device, op, &[values(3, &[TOKENS, d])?], |inputs| {
        let logits = product(&inputs[0], &w, d);
        let counted = logits.chunks(vocab).zip(&targets);
        let losses: Vec<f64> = counted
            .filter_map(|(row, target)| Some(-log_softmax(row)[(*target)? as usize]))
            .collect();
        vec![losses.iter().sum::<f64>() / losses.len() as f64]
    })
}

/// Both parts of a step of generation: a linear map of few rows, and attention of one query.
fn decode(device: &Device) -> Result<f64> {
    let (inner, out) = (48, 40);
    let (x, weight) = (values(1, &[3, inner])?, values(2, &[out, inner])?);
    let map = Map {
        weight: &weight.to_bf16()?,
        bias: None,
    };
    let y = device.run(|| linear(device, &x, &[map]))?;
    let right = product(&f64s(&x)?, &f64s(&weight)?, inner);
    let found = y.first().map_or(Ok(Vec::new()), f64s)?;
    let heads = Heads {
        queries: 4,
        kv: 2,
        dim: 16,
    };
    let theta = 10_000.0;
    let width = heads.kv * heads.dim;
    let q = values(3, &[1, heads.queries * heads.dim])?;
    // All but the last token's keys and values are in the cache.
    let last = TOKENS - 1;
    let cached = [values(4, &[last, width])?, values(5, &[last, width])?];
    let new = [values(6, &[1, width])?, values(7, &[1, width])?];
    let attended = device.run(|| {
        let mut cache = KvCache::new(device, 1, width);
        cache.extend(device, 0, &cached[0], &cached[1])?;
        let table = RopeTable::new(TOKENS, heads.dim, theta)?;
        let mut caches = [&mut cache];
        let mut batch = Batch::new(device, heads, &table, &mut caches, 0)?;
        batch.attention(0, q.clone(), new[0].clone(), &new[1])
    })?;
    let (mut q, mut k, mut v) = (f64s(&q)?, f64s(&cached[0])?, f64s(&cached[1])?);
    k.extend(f64s(&new[0])?);
    v.extend(f64s(&new[1])?);
    let turned = q.chunks_mut(heads.dim);
    let turned = turned.chain(k[last * width..].chunks_mut(heads.dim));
    turned.for_each(|head| rotate(head, last, theta));
    let group = heads.queries / heads.kv;
    let expected = q
        .chunks(heads.dim)
        .enumerate()
        .flat_map(|(i, q)| attend(q, &k, &v, [TOKENS, i / group * heads.dim, width]));
    let off = relative_error(&f64s(&attended)?, &expected.collect::<Vec<_>>());
    Ok(off.max(relative_error(&found, &right)))
}

/// Draws that no rounding decides.
fn sample(device: &Device) -> Result<f64> {
    let (vocab, top_k) = (50, 30);
    let filter = Filter {
        temperature: 0.25,
        top_k,
        top_p: 0.9,
    };
    let logits = values(1, &[TOKENS, vocab])?;
    let share = |t: usize| (t as f64 + 0.5) / TOKENS as f64;
    let words: Vec<u64> = (0..TOKENS)
        .map(|t| (share(t) * 2f64.powi(64)) as u64)
        .collect();
    let found = device.run(|| sample::sample(device, &logits, filter, &words)?.to_u32())?;
    let exact = f64s(&logits)?;
    let right = exact.chunks(vocab).enumerate().map(|(t, row)| {
        let weight = |i: usize| (row[i] / f64::from(filter.temperature)).exp();
        let mut order: Vec<usize> = (0..vocab).collect();
        // Of equal values the lower id comes first: the sort is stable.
        order.sort_by(|&a, &b| row[b].total_cmp(&row[a]));
        order.truncate(top_k);
        let total: f64 = order.iter().map(|&i| weight(i)).sum();
        let mut before = 0.0;
        order.retain(|&i| {
            let kept = before < f64::from(filter.top_p) * total;
            before += weight(i);
            kept
        });
        order.sort_unstable();
        let target = share(t) * order.iter().map(|&i| weight(i)).sum::<f64>();
        let mut sum = 0.0;
        let drawn = order.iter().find(|&&i| {
            sum += weight(i);
            sum > target
        });
        drawn.map_or(f64::NAN, |&i| i as f64)
    });
    let found: Vec<f64> = found.u32s()?.iter().map(|&token| token.into()).collect();
    Ok(relative_error(&found, &right.collect::<Vec<_>>()))
}

/// Steps of an optimizer: the parameter before and after, and the gradients.
fn steps(
    mut step: impl FnMut(Update) -> Result<()>,
    mut reference: impl FnMut(&mut [f64], &[f64]),
) -> Result<f64> {
    let shape = [9, 40];
    let mut value = values(1, &shape)?;
    let start = f64s(&value)?;
    let mut right = start.clone();
    for n in 0..3 {
        let grad = values(2 + n, &shape)?;
        reference(&mut right, &f64s(&grad)?);
        step(Update {
            value: &mut value,
            grad,
            unit_rows: false,
        })?;
    }
    // What the steps changed: beside the values themselves a wrong step would hardly show.
    let change = |end: &[f64]| -> Vec<f64> {
        let pairs = end.iter().zip(&start);
        pairs.map(|(end, start)| end - start).collect()
    };
    Ok(relative_error(&change(&f64s(&value)?), &change(&right)))
}

fn adamw(device: &Device) -> Result<f64> {
    let (config, lr) = (AdamWConfig::default(), 0.01);
    let mut optimizer = AdamW::new(config, &[values(1, &[9, 40])?])?;
    let mut moments = vec![[0.0f64; 2]; 9 * 40];
    let mut n = 0;
    let step = |update: Update| device.run(|| optimizer.step(device, lr, vec![update]));
    steps(step, |value, grad| {
        n += 1;
        for ((v, g), [first, second]) in value.iter_mut().zip(grad).zip(&mut moments) {
            *first = config.beta1 * *first + (1.0 - config.beta1) * g;
            *second = config.beta2 * *second + (1.0 - config.beta2) * g * g;
            let first = *first / (1.0 - config.beta1.powi(n));
            let second = *second / (1.0 - config.beta2.powi(n));
            *v -= lr * (config.weight_decay * *v + first / (second.sqrt() + config.eps));
        }
    })
}

fn signum(device: &Device) -> Result<f64> {
    let (lr, beta) = (0.01f32, f64::from(Signum::BETA));
    let mut optimizer = Signum::new(lr);
    let mut z: Option<Vec<f64>> = None;
    let mut n = 0.0;
    let step = |update: Update| device.run(|| optimizer.step(device, vec![update]));
    steps(step, |value, grad| {
        n += 1.0;
        let z = z.get_or_insert_with(|| value.to_vec());
        for ((y, g), z) in value.iter_mut().zip(grad).zip(z) {
            let x = (*y - (1.0 - beta) * *z) / beta;
            let sign = if *g == 0.0 { 0.0 } else { g.signum() };
            *z -= f64::from(lr) * sign;
            *y = beta * (x + (*z - x) / n) + (1.0 - beta) * *z;
        }
    })
}

fn clip(device: &Device) -> Result<f64> {
    let mut grads = [values(1, &[9, 40])?, values(2, &[77])?];
    let before: Vec<Vec<f64>> = grads.iter().map(f64s).collect::<Result<_>>()?;
    let squares = before.iter().flatten().map(|g| g * g);
    let right = squares.sum::<f64>().sqrt();
    let most = right / 3.0;
    let norm = device.run(|| {
        let mut all: Vec<&mut Tensor> = grads.iter_mut().collect();
        clip_grad_norm(device, &mut all, most)
    })?;
    let mut worst = (norm / right - 1.0).abs();
    for (grad, before) in grads.iter().zip(&before) {
        let scaled: Vec<f64> = before.iter().map(|g| g * most / (right + 1e-6)).collect();
        worst = worst.max(relative_error(&f64s(grad)?, &scaled));
    }
    Ok(worst)
}
