use std::sync::Arc;

use resa_engine::Device;
use resa_engine::ops::rope::{Rope, RopeTable};
use resa_engine::tape::{Tape, Var};

use super::harness::{check, random};

/// Rotates each pair (i, i + D/2) as a complex number, in float64.
fn reference(x: &[f64], rope: &Rope, head_dim: usize, theta: f64) -> Vec<f64> {
    let half = head_dim / 2;
    let mut y = vec![0.0; x.len()];
    for (head, (x, y)) in x.chunks(head_dim).zip(y.chunks_mut(head_dim)).enumerate() {
        let position = rope.start + (head / rope.heads) % rope.seq_len;
        for i in 0..half {
            let angle = position as f64 / theta.powf(2.0 * i as f64 / head_dim as f64);
            let (sin, cos) = angle.sin_cos();
            y[i] = x[i] * cos - x[i + half] * sin;
            y[i + half] = x[i] * sin + x[i + half] * cos;
        }
    }
    y
}

#[test]
fn odd_shapes_agree_with_float64() {
    // (batch, seq_len, start, heads, head_dim)
    let shapes = [
        (1, 1, 0, 1, 2),
        (2, 17, 0, 3, 16),
        (1, 31, 100, 2, 64),
        (3, 5, 2, 1, 6),
        (1, 16, 0, 9, 128),
    ];
    let theta = 10_000.0;
    for (batch, seq_len, start, heads, head_dim) in shapes {
        let table = RopeTable::new(start + seq_len, head_dim, theta).unwrap();
        let make = || Rope {
            seq_len,
            start,
            heads,
            table: Arc::clone(&table),
        };
        check(
            make,
            &[random(3, &[batch * seq_len, heads * head_dim], 1.0)],
            |inputs| vec![reference(&inputs[0], &make(), head_dim, theta)],
            1e-6,
        );
    }
}

#[test]
fn wrong_sizes_are_errors() {
    assert!(RopeTable::new(8, 7, 10_000.0).is_err());
    assert!(RopeTable::new(8, 0, 10_000.0).is_err());
    let device = Device::cpu(1).unwrap();
    let table = RopeTable::new(8, 4, 10_000.0).unwrap();
    let apply = |seq_len, start, cols| {
        let rope = Rope {
            seq_len,
            start,
            heads: 2,
            table: Arc::clone(&table),
        };
        let x = Var::constant(random(1, &[8, cols], 1.0));
        Tape::new(&device).apply(rope, &[&x]).map(|_| ())
    };
    assert!(apply(8, 0, 8).is_ok());
    assert!(apply(8, 0, 12).is_err());
    assert!(apply(0, 0, 8).is_err());
    let error = apply(8, 1, 8).unwrap_err().to_string();
    assert!(error.contains("8 positions"), "{error}");
}
