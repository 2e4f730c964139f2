use proptest::prelude::*;
use resa_engine::data::{Record, Template, Text, Tokenizer, order, pack};
use serde_json::json;

use crate::{TOKENIZERS, fixture, json, strings};

fn tokenizer(name: &str) -> Tokenizer {
    Tokenizer::from_dir(fixture(name)).unwrap()
}

fn texts(texts: &[String]) -> Vec<Text> {
    texts
        .iter()
        .map(|text| Text {
            text: text.clone(),
            answer_start: text.len(),
        })
        .collect()
}

/// The definition: every block joined with EOS, tokenised as one string, cut into rows.
fn packed_as_whole_blocks(texts: &[Text], tokenizer: &Tokenizer, seq_len: usize) -> Vec<Vec<u32>> {
    let bos: Vec<u32> = tokenizer.bos().into_iter().collect();
    let mut rows = Vec::new();
    for block in texts.chunks(2048) {
        let joined: String = block
            .iter()
            .map(|text| format!("{}{}", tokenizer.eos_token(), text.text))
            .collect();
        let ids = tokenizer.encode(&joined, false).unwrap();
        for row in ids.chunks_exact(seq_len - bos.len()) {
            rows.push([&bos, row].concat());
        }
    }
    rows
}

#[test]
fn rows_equal_the_python_tools() {
    let texts = texts(&strings(&json("texts.json")));
    for name in TOKENIZERS {
        let expected = json(&format!("{name}/expected.json"));
        let seq_len = expected["seq_len"].as_u64().unwrap() as usize;
        let packed = pack(&texts, &tokenizer(name), seq_len, false).unwrap();
        assert_eq!(expected["rows"].as_array().unwrap().len(), packed.rows());
        for i in 0..packed.rows() {
            assert_eq!(json!(packed.row(i)), expected["rows"][i], "{name}, row {i}");
        }
        assert!(packed.rows() > 30 && packed.doc_starts.is_none());
    }
}

#[test]
fn every_block_of_2048_texts_drops_its_own_rest() {
    let many: Vec<_> = (0..4100).map(|i| format!("number {i}")).collect();
    let many = texts(&many);
    for name in TOKENIZERS {
        let tokenizer = tokenizer(name);
        let packed = pack(&many, &tokenizer, 97, false).unwrap();
        let rows: Vec<_> = (0..packed.rows()).map(|i| packed.row(i).to_vec()).collect();
        assert_eq!(
            rows,
            packed_as_whole_blocks(&many, &tokenizer, 97),
            "{name}"
        );
        // The third block, four short texts, fills no row.
        let two_blocks = pack(&many[..4096], &tokenizer, 97, false).unwrap();
        assert_eq!(packed, two_blocks);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn texts_tokenised_one_by_one_equal_the_joined_block(
        parts in prop::collection::vec(prop::collection::vec(prop_oneof![
            Just("<eos>".to_owned()), Just("<eo".to_owned()), Just("s>".to_owned()), Just("<".to_owned()),
            Just(" ".to_owned()), Just("\n\n".to_owned()), Just("\u{301}".to_owned()), Just("\u{338}".to_owned()),
            Just("\u{2581}".to_owned()), Just("<pad>".to_owned()), Just("12".to_owned()), "[a-e ]{1,6}", any::<char>().prop_map(String::from),
        ], 0..8), 1..12),
    ) {
        let parts: Vec<String> = parts.into_iter().map(|part| part.concat()).collect();
        let texts = texts(&parts);
        for name in TOKENIZERS {
            let tokenizer = tokenizer(name);
            let expected = packed_as_whole_blocks(&texts, &tokenizer, 2);
            prop_assume!(!expected.is_empty());
            let packed = pack(&texts, &tokenizer, 2, true).unwrap();
            let rows: Vec<_> = (0..packed.rows()).map(|i| packed.row(i).to_vec()).collect();
            prop_assert_eq!(rows, expected, "{}", name);
        }
    }
}

#[test]
fn documents_start_at_their_eos_and_rows_that_continue_one_at_zero() {
    // "ab" is no merge: three tokens a document, EOS first.
    let tokenizer = tokenizer("byte_level");
    let texts = texts(&[
        "\u{1}\u{2}".into(),
        "\u{1}\u{2}".into(),
        "\u{1}\u{2}".into(),
    ]);
    let packed = pack(&texts, &tokenizer, 4, true).unwrap();
    assert_eq!(packed.rows(), 2);
    let eos = tokenizer.eos_id();
    let at: Vec<_> = packed.tokens.iter().map(|&id| id == eos).collect();
    assert_eq!(at, [true, false, false, true, false, false, true, false]);
    assert_eq!(packed.row_doc_starts(0).unwrap(), [0, 0, 0, 3]);
    assert_eq!(packed.row_doc_starts(1).unwrap(), [0, 0, 2, 2]);
}

#[test]
fn with_bos_every_row_starts_with_it_and_documents_count_from_the_row() {
    let tokenizer = tokenizer("metaspace_bos");
    let texts = texts(&["x".into(), "y".into(), "z".into()]);
    let flat = tokenizer.encode("<eos>x<eos>y<eos>z", false).unwrap();
    let packed = pack(&texts, &tokenizer, 4, true).unwrap();
    assert_eq!(packed.rows(), flat.len() / 3);
    for i in 0..packed.rows() {
        let row = packed.row(i);
        assert_eq!(row[0], tokenizer.bos().unwrap());
        assert_eq!(row[1..], flat[3 * i..3 * i + 3]);
        let mut start = 0;
        for (position, &id) in row.iter().enumerate() {
            if id == tokenizer.eos_id() {
                start = position as u32;
            }
            assert_eq!(packed.row_doc_starts(i).unwrap()[position], start);
        }
        assert!(!packed.row_answer_mask(i)[0]);
    }
}

#[test]
fn the_answer_mask_marks_what_follows_the_prompt_and_the_eos_that_ends_it() {
    let template = Template::builtin();
    let records: Vec<_> = (0..20)
        .map(|i| Record {
            problem: format!("What is {i} + {i}? Caf\u{e9}\u{301}"),
            answer: format!("\u{4f60}{}", 2 * i),
        })
        .collect();
    let texts: Vec<_> = records
        .iter()
        .map(|record| template.render_text(record).unwrap())
        .collect();
    for name in TOKENIZERS {
        let tokenizer = tokenizer(name);
        let packed = pack(&texts, &tokenizer, 64, false).unwrap();
        // Rows without BOS in one sequence; runs of marked tokens decode to the answer parts.
        let tokens = (0..packed.rows()).flat_map(|i| {
            let skip = usize::from(tokenizer.bos().is_some());
            let mask = packed.row_answer_mask(i);
            packed
                .row(i)
                .iter()
                .copied()
                .zip(mask.iter().copied())
                .skip(skip)
        });
        let tokens: Vec<(u32, bool)> = tokens.collect();
        let runs: Vec<_> = tokens
            .chunk_by(|a, b| a.1 == b.1)
            .map(|run| (run[0].1, run.iter().map(|t| t.0).collect::<Vec<u32>>()))
            .collect();
        let answers: Vec<_> = runs.iter().filter(|run| run.0).collect();
        assert!(answers.len() >= 19, "{name}");
        // The last run may be cut by the end of the last row.
        for ((_, ids), text) in answers[..answers.len() - 1].iter().zip(&texts) {
            assert_eq!(ids.last(), Some(&tokenizer.eos_id()), "{name}");
            let decoded = tokenizer.decode(ids, false).unwrap();
            let answer = format!("{}<eos>", &text.text[text.answer_start..]);
            assert_eq!(decoded.trim_start(), answer.trim_start(), "{name}");
        }
    }
}

#[test]
fn data_that_fill_no_row_are_refused_with_the_numbers() {
    let tokenizer = tokenizer("byte_level");
    let two = texts(&["\u{1}\u{2}".into(), "\u{1}".into()]);
    let message = pack(&two, &tokenizer, 6, false).unwrap_err().to_string();
    for word in ["--seq-len", " 6 ", " 5 ", "2 texts"] {
        assert!(message.contains(word), "{message}");
    }
    assert_eq!(pack(&two, &tokenizer, 5, false).unwrap().rows(), 1);
    assert!(pack(&[], &tokenizer, 5, false).is_err());
    assert!(pack(&two, &tokenizer, 0, false).is_err());
    let bos = Tokenizer::from_dir(fixture("metaspace_bos")).unwrap();
    assert!(pack(&two, &bos, 1, false).is_err());
}

#[test]
fn order_is_the_files_or_a_permutation_of_its_own_for_each_seed_and_epoch() {
    assert_eq!(order(4, None, 3), [0, 1, 2, 3]);
    let first = order(1000, Some(7), 0);
    assert_eq!(first, order(1000, Some(7), 0));
    assert_ne!(first, order(1000, Some(7), 1));
    assert_ne!(first, order(1000, Some(8), 0));
    let mut sorted = first;
    sorted.sort_unstable();
    assert_eq!(sorted, order(1000, None, 0));
}
