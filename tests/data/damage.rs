//! Damaged files: every one gives records or an error, never a panic.

use std::path::Path;

use resa_engine::data::records::read;
use resa_engine::data::{Template, Tokenizer};
use resa_engine::rng::{Purpose, Stream};
use tempfile::TempDir;

use crate::fixture;

/// Copies of `bytes` with one to four bytes changed.
fn flipped(bytes: &[u8], copies: u64) -> impl Iterator<Item = Vec<u8>> {
    (0..copies).map(move |i| {
        let random = Stream::new(1, Purpose::Sampling, i, 0);
        let mut copy = bytes.to_vec();
        for flip in 0..=u64::from(random.word(0) % 4) {
            let at = random.word(2 * flip + 1) as usize % copy.len();
            copy[at] ^= 1 << (random.word(2 * flip + 2) % 8);
        }
        copy
    })
}

fn read_bytes(path: &Path, bytes: &[u8]) -> Result<usize, String> {
    std::fs::write(path, bytes).unwrap();
    read(path)
        .map(|records| records.len())
        .map_err(|e| e.to_string())
}

#[test]
fn a_truncated_parquet_file_is_an_error_that_names_it() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("cut.parquet");
    for codec in ["snappy", "none"] {
        let bytes = std::fs::read(fixture(&format!("{codec}.parquet"))).unwrap();
        for length in (0..bytes.len()).step_by(11).chain([bytes.len() - 1]) {
            let error = read_bytes(&path, &bytes[..length]).unwrap_err();
            assert!(error.contains("cut.parquet"), "{length}: {error}");
        }
    }
}

#[test]
fn a_parquet_file_with_changed_bytes_never_panics() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("flip.parquet");
    let mut refused = 0;
    for name in [
        "snappy",
        "none",
        "zstd",
        "answer_dictionary",
        "answer_decimal",
    ] {
        let bytes = std::fs::read(fixture(&format!("{name}.parquet"))).unwrap();
        for copy in flipped(&bytes, 400) {
            refused += usize::from(read_bytes(&path, &copy).is_err());
        }
        // The footer holds schema, offsets and sizes: change it more often.
        let (body, footer) = bytes.split_at(bytes.len().saturating_sub(1000));
        for copy in flipped(footer, 400) {
            refused += usize::from(read_bytes(&path, &[body, &copy].concat()).is_err());
        }
    }
    assert!(refused > 1000, "{refused}");
}

#[test]
fn a_parquet_schema_nested_without_end_is_refused() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("deep.parquet");
    // Compact Thrift: version 1, then the schema: groups named "g" with one child each.
    for depth in [60, 1 << 20] {
        let group = [0x35, 0, 0x18, 1, b'g', 0x15, 2, 0];
        let root = [0x48, 1, b'r', 0x15, 2, 0];
        let leaf = [0x15, 12, 0x25, 0, 0x18, 1, b'l', 0];
        let mut footer = vec![0x15, 2, 0x19, 0xfc];
        let mut count = depth + 2;
        while count >= 128 {
            footer.push(count as u8 | 128);
            count >>= 7;
        }
        footer.push(count as u8);
        footer.extend(root);
        footer.extend(group.repeat(depth));
        footer.extend(leaf);
        footer.extend([0x16, 0, 0x19, 0x0c, 0]);
        let length = (footer.len() as u32).to_le_bytes();
        let bytes = [b"PAR1", footer.as_slice(), &length, b"PAR1"].concat();
        let error = read_bytes(&path, &bytes).unwrap_err();
        let word = if depth == 60 { "no column" } else { "nested" };
        assert!(
            error.contains("deep.parquet") && error.contains(word),
            "{depth}: {error}"
        );
    }
}

#[test]
fn json_with_changed_bytes_never_panics() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("flip.jsonl");
    let bytes = std::fs::read(fixture("records.jsonl")).unwrap();
    let refused = flipped(&bytes, 300)
        .filter(|copy| read_bytes(&path, copy).is_err())
        .count();
    assert!(refused > 50, "{refused}");
}

#[test]
fn a_damaged_tokenizer_never_panics() {
    let dir = TempDir::new().unwrap();
    for name in ["byte_level", "metaspace_bos"] {
        let source = fixture(name);
        let config = std::fs::read(source.join("tokenizer_config.json")).unwrap();
        std::fs::write(dir.path().join("tokenizer_config.json"), config).unwrap();
        let bytes = std::fs::read(source.join("tokenizer.json")).unwrap();
        let target = dir.path().join("tokenizer.json");
        let mut refused = 0;
        for copy in flipped(&bytes, 300).chain([bytes[..bytes.len() / 2].to_vec()]) {
            std::fs::write(&target, copy).unwrap();
            match Tokenizer::from_dir(dir.path()) {
                Ok(tokenizer) => {
                    let ids = tokenizer.encode("Caf\u{e9} 12 <eos>\n", true);
                    drop(ids.and_then(|ids| tokenizer.decode(&ids, true)));
                }
                Err(error) => {
                    assert!(error.to_string().contains("tokenizer"), "{error}");
                    refused += 1;
                }
            }
        }
        assert!(refused > 10, "{name}: {refused}");
    }
}

#[test]
fn a_damaged_template_never_panics() {
    let source = "{% for c in problem %}{{ c | upper }}{% endfor %} {{ answer }} {# x #}";
    let record = resa_engine::data::Record {
        problem: "p".into(),
        answer: "1".into(),
    };
    for copy in flipped(source.as_bytes(), 500) {
        let text = String::from_utf8_lossy(&copy);
        drop(Template::parse("t", &text).and_then(|template| template.render_text(&record)));
    }
}
