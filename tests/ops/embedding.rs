use std::collections::BTreeSet;
use std::io::Write;
use std::sync::Arc;

use half::{bf16, f16};
use resa_engine::Device;
use resa_engine::ops::Operator;
use resa_engine::ops::embedding::Embedding;
use resa_engine::tape::{Tape, Var};
use resa_engine::tensor::{DType, MappedBytes, Tensor};

use super::harness::{assert_least_traffic, check, cuda, random};

fn ids(count: usize, vocab: usize) -> Tensor {
    let ids = (0..count).map(|t| (t * t * 7 % vocab) as u32).collect();
    Tensor::from_u32(ids, [count]).unwrap()
}

#[test]
fn rows_are_copied_and_gradients_of_repeated_ids_add_up() {
    // The last has more tokens of one id, and longer rows, than a block of a GPU takes at once.
    for (count, vocab, d) in [(1, 1, 1), (17, 5, 3), (31, 101, 64), (601, 2, 1028)] {
        let ids = ids(count, vocab);
        let rows = |table: &[f64]| -> Vec<f64> {
            let ids = ids.u32s().unwrap().iter();
            ids.flat_map(|&id| table[id as usize * d..][..d].to_vec())
                .collect()
        };
        check(
            || Embedding { ids: ids.clone() },
            &[random(6, &[vocab, d], 1.0)],
            |inputs| vec![rows(&inputs[0])],
            1e-6,
        );
    }
}

#[test]
fn a_memory_mapped_table_of_16_bit_floats_is_widened() {
    let device = Device::cpu(1).unwrap();
    // Exact in both types.
    let values = [1.5f32, -2.0, 0.25, 96.0, -0.125, 7.0];
    for dtype in [DType::Bf16, DType::F16] {
        let mut file = tempfile::tempfile().unwrap();
        for v in values {
            let bytes = match dtype {
                DType::Bf16 => bf16::from_f32(v).to_le_bytes(),
                _ => f16::from_f32(v).to_le_bytes(),
            };
            file.write_all(&bytes).unwrap();
        }
        // SAFETY: the file has no name; nobody else can change it.
        let map = Arc::new(unsafe { memmap2::Mmap::map(&file) }.unwrap());
        // SAFETY: the map is of a file.
        let table = unsafe { MappedBytes::new(map, 0..12, dtype) }.unwrap();
        let table = Var::constant(Tensor::from_mapped(table, [3, 2]).unwrap());
        let ids = Tensor::from_u32(vec![2, 0, 2], [3]).unwrap();
        let rows = Tape::new(&device)
            .apply(Embedding { ids }, &[&table])
            .unwrap();
        let want = [-0.125, 7.0, 1.5, -2.0, -0.125, 7.0];
        assert_eq!(rows.value().f32s().unwrap(), &want);
    }
}

#[test]
fn an_id_outside_the_vocabulary_is_named() {
    let device = Device::cpu(1).unwrap();
    let table = Var::constant(random(1, &[10, 4], 1.0));
    let ids = Tensor::from_u32(vec![3, 10, 2], [3]).unwrap();
    let error = Tape::new(&device)
        .apply(Embedding { ids }, &[&table])
        .unwrap_err()
        .to_string();
    assert!(error.contains("id 10 at position 1"), "{error}");
}

#[test]
fn backward_reads_each_gradient_once_and_writes_each_row_once_on_the_gpu() {
    let Some(device) = cuda() else { return };
    let (count, vocab, d) = (500, 101, 256);
    let op = Embedding {
        ids: ids(count, vocab),
    };
    let distinct: BTreeSet<u32> = op.ids.u32s().unwrap().iter().copied().collect();
    let gradient = Some(random(1, &[count, d], 1.0));
    op.backward(device, [vocab, d], vec![gradient], &[true])
        .unwrap();
    assert_least_traffic(2 * count * d + 4 * distinct.len() * d);
}
