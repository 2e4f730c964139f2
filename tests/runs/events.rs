use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use resa_engine::report::TensorBoard;
use resa_engine::train::{Event, StepMetrics, StepStage};

/// Bit by bit from the polynomial, apart from the engine's table.
fn masked_crc(data: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in data {
        for bit in 0..8 {
            let feedback = (crc ^ u32::from(byte >> bit)) & 1;
            crc = (crc >> 1) ^ if feedback == 1 { 0x82f6_3b78 } else { 0 };
        }
    }
    let crc = !crc;
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}

fn take<const N: usize>(bytes: &mut &[u8]) -> [u8; N] {
    let (head, rest) = bytes.split_first_chunk::<N>().unwrap();
    *bytes = rest;
    *head
}

/// The records of an event file, every checksum checked.
fn records(path: &Path) -> Vec<Vec<u8>> {
    let file = fs::read(path).unwrap();
    let mut rest = file.as_slice();
    let mut records = Vec::new();
    while !rest.is_empty() {
        let length = take::<8>(&mut rest);
        assert_eq!(u32::from_le_bytes(take(&mut rest)), masked_crc(&length));
        let (data, after) = rest.split_at(u64::from_le_bytes(length) as usize);
        rest = after;
        assert_eq!(u32::from_le_bytes(take(&mut rest)), masked_crc(data));
        records.push(data.to_vec());
    }
    records
}

#[derive(Debug, PartialEq)]
enum Field {
    Varint(u64),
    Double(f64),
    Float(f32),
    Bytes(Vec<u8>),
}

fn varint(bytes: &mut &[u8]) -> u64 {
    let mut value = 0;
    for shift in (0..).step_by(7) {
        let [byte] = take(bytes);
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            break;
        }
    }
    value
}

/// The fields of a protocol buffer message.
fn fields(mut bytes: &[u8]) -> Vec<(u64, Field)> {
    let mut fields = Vec::new();
    while !bytes.is_empty() {
        let key = varint(&mut bytes);
        let field = match key & 7 {
            0 => Field::Varint(varint(&mut bytes)),
            1 => Field::Double(f64::from_le_bytes(take(&mut bytes))),
            2 => {
                let length = varint(&mut bytes) as usize;
                let (data, rest) = bytes.split_at(length);
                bytes = rest;
                Field::Bytes(data.to_vec())
            }
            5 => Field::Float(f32::from_le_bytes(take(&mut bytes))),
            other => panic!("wire type {other}"),
        };
        fields.push((key >> 3, field));
    }
    fields
}

/// Step and values by tag of an event with a summary.
fn scalars(record: &[u8]) -> (u64, BTreeMap<String, f32>) {
    let event: BTreeMap<u64, Field> = fields(record).into_iter().collect();
    assert!(matches!(event[&1], Field::Double(time) if time > 1.6e9));
    let (Field::Varint(step), Field::Bytes(summary)) = (&event[&2], &event[&5]) else {
        panic!("{event:?}");
    };
    let values = fields(summary).into_iter().map(|(number, value)| {
        let Field::Bytes(value) = value else {
            panic!("{value:?}")
        };
        assert_eq!(number, 1);
        match fields(&value).as_slice() {
            [(1, Field::Bytes(tag)), (2, Field::Float(number))] => {
                (String::from_utf8(tag.clone()).unwrap(), *number)
            }
            other => panic!("{other:?}"),
        }
    });
    (*step, values.collect())
}

fn event_files(dir: &Path) -> Vec<std::path::PathBuf> {
    let Ok(entries) = fs::read_dir(dir) else {
        return Vec::new();
    };
    let mut files: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

fn step(stage: StepStage, step: u64, set: impl FnOnce(&mut StepMetrics)) -> Event {
    let mut metrics = StepMetrics::new(stage, step);
    set(&mut metrics);
    Event::Step(metrics)
}

#[test]
fn an_event_file_holds_the_metrics_of_every_step() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("run");
    let mut events = TensorBoard::new(&dir);
    events
        .record(&Event::Note("nothing to plot".to_owned()))
        .unwrap();
    assert!(
        event_files(&dir).is_empty(),
        "the run folder is still the trainer's to make"
    );
    let sae = step(StepStage::Sae, 300, |m| {
        m.fvu = Some(0.125);
        m.hookpoint = Some("model.layers.12".to_owned());
    });
    events.record(&sae).unwrap();
    let sft = step(StepStage::Sft, 1, |m| m.kl_per_token = Some(0.75));
    events.record(&sft).unwrap();

    let files = event_files(&dir);
    assert_eq!(files.len(), 1);
    let name = files[0].file_name().unwrap().to_str().unwrap();
    assert!(name.starts_with("events.out.tfevents."), "{name}");
    let records = records(&files[0]);
    assert_eq!(records.len(), 3);
    let version = (3, Field::Bytes(b"brain.Event:2".to_vec()));
    assert!(fields(&records[0]).contains(&version));
    let (number, values) = scalars(&records[1]);
    assert_eq!((number, values["sae/model.layers.12/fvu"]), (300, 0.125));
    assert!(!values.contains_key("sae/model.layers.12/kl"));
    let (number, values) = scalars(&records[2]);
    assert_eq!((number, values["sft/kl_per_token"]), (1, 0.75));
}

#[test]
fn a_resumed_run_goes_on_in_a_later_file() {
    let temp = tempfile::tempdir().unwrap();
    for number in 1..=2 {
        let mut events = TensorBoard::new(temp.path());
        events
            .record(&step(StepStage::Sft, number, |_| {}))
            .unwrap();
    }
    let files = event_files(temp.path());
    let steps: Vec<u64> = files
        .iter()
        .map(|file| scalars(&records(file)[1]).0)
        .collect();
    assert_eq!(steps, [1, 2]);
}
