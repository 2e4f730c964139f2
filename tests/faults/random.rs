//! Random damage: whatever the bytes, reading returns and does not panic.

use std::fs;

use proptest::prelude::*;
use resa_engine::formats::safetensors::SafeTensors;
use resa_engine::formats::{huggingface, peft, sparsify};

use crate::fixture::Fixture;

/// Positions (as a fraction of the file's length, the first part preferred: there the header
/// is) and the bytes to put there.
fn damage() -> impl Strategy<Value = Vec<(f64, u8)>> {
    prop::collection::vec((0.0..1.0f64, any::<u8>()), 1..6)
}

fn apply(bytes: &mut [u8], damage: &[(f64, u8)]) {
    let len = bytes.len();
    for &(position, byte) in damage {
        bytes[(position * position * len as f64) as usize] = byte;
    }
}

const FILES: [&str; 7] = [
    "model/config.json",
    "model/model.safetensors.index.json",
    "model/b.safetensors",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    "sae/cfg.json",
    "sae/sae.safetensors",
];

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn changed_bytes_in_any_file_give_a_result(file in 0..FILES.len(), damage in damage()) {
        let fixture = Fixture::new();
        fixture.shard();
        let path = fixture.root().join(FILES[file]);
        let mut bytes = fs::read(&path).unwrap();
        apply(&mut bytes, &damage);
        fs::write(&path, bytes).unwrap();
        // Some damage is harmless (a changed weight), so either result is right.
        let root = fixture.root().to_str().unwrap();
        for result in [
            huggingface::load(&fixture.model()).map(drop),
            huggingface::read_config(&fixture.model())
                .and_then(|config| peft::load(&fixture.adapter(), &config).map(drop)),
            sparsify::load(&fixture.sae()).map(drop),
        ] {
            if let Err(error) = result {
                prop_assert!(error.to_string().contains(root), "no file in: {error}");
            }
        }
    }

    #[test]
    fn any_header_gives_a_result(
        header in "\\{(\"[ab_]{1,2}\":\\{\"dtype\":\"(F32|F16|BF16|U32|U8|F4)\",\"shape\":\\[[0-9]{1,20}(,[0-9]{1,20})?\\],\"data_offsets\":\\[[0-9]{1,20},[0-9]{1,20}\\]\\},?){1,3}\\}",
        length in prop_oneof![3 => Just(None), 1 => any::<u64>().prop_map(Some)],
        data in 0usize..64,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        let mut bytes = length.unwrap_or(header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        fs::write(&path, bytes).unwrap();
        match SafeTensors::open(&path) {
            Err(error) => prop_assert!(error.to_string().contains("x.safetensors"), "{error}"),
            Ok(file) => {
                for name in file.names() {
                    if let Ok(tensor) = file.tensor(name) {
                        prop_assert!(tensor.len() * tensor.dtype().size() <= data);
                    }
                }
            }
        }
    }
}
