//! What is written while a model is trained, read back by other means.

use std::time::Duration;

use bevel_train::{EventWriter, StepLog, StepReport};

fn report(step: usize) -> StepReport {
    StepReport {
        step,
        loss: 3.0 - step as f64 / 64.0,
        gradient_norm: 0.5,
        learning_rate: 1e-4,
        tokens: 300,
        time: Duration::from_millis(1500),
        held_out: step.is_multiple_of(2).then_some(2.75),
        preferred: None,
    }
}

/// Turned by 15 bits, and shifted.
fn mask(crc: u32) -> u32 {
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32C by a table of all bytes, masked as TFRecords have it.
fn masked_crc(bytes: &[u8]) -> u32 {
    let table: Vec<u32> = (0..256u32)
        .map(|byte| {
            (0..8).fold(byte, |c, _| if c % 2 == 1 { 0x82f6_3b78 ^ (c / 2) } else { c / 2 })
        })
        .collect();
    let mut crc = u32::MAX;
    for &byte in bytes {
        crc = table[(crc as u8 ^ byte) as usize] ^ (crc >> 8);
    }
    let crc = crc ^ u32::MAX;
    mask(crc)
}

/// A message's fields: number, and a number or bytes.
fn fields(mut bytes: &[u8]) -> Vec<(u64, u64, &[u8])> {
    fn varint(bytes: &mut &[u8]) -> u64 {
        let len = 1 + bytes.iter().position(|byte| byte & 128 == 0).unwrap();
        let (number, rest) = bytes.split_at(len);
        *bytes = rest;
        number.iter().rev().fold(0, |value, byte| value << 7 | u64::from(byte & 127))
    }
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let key = varint(&mut bytes);
        let (number, len) = match key & 7 {
            0 => (varint(&mut bytes), 0),
            1 => (0, 8),
            2 => (0, varint(&mut bytes) as usize),
            5 => (0, 4),
            wire => panic!("wire type {wire}"),
        };
        let (value, rest) = bytes.split_at(len);
        bytes = rest;
        found.push((key >> 3, number, value));
    }
    found
}

#[test]
fn sums_are_those_of_the_standard() {
    // RFC 3720, B.4: of 32 zeros, and of 32 bytes of ones.
    assert_eq!(masked_crc(&[0; 32]), mask(0x8a91_36aa));
    assert_eq!(masked_crc(&[255; 32]), mask(0x62a8_ab43));
}

#[test]
fn events_are_read_back() {
    let directory = tempfile::tempdir().unwrap();
    let runs = directory.path().join("deep/runs");
    let mut writer = EventWriter::create(&runs).unwrap();
    writer.scalars(0, &[("eval/loss", 3.25)]).unwrap();
    for step in [1, 2, 300] {
        writer.step(&report(step)).unwrap();
    }
    let path = std::fs::read_dir(&runs).unwrap().next().unwrap().unwrap().path();
    assert!(path.file_name().unwrap().to_str().unwrap().starts_with("events.out.tfevents."));
    // There while the run goes on.
    let bytes = std::fs::read(&path).unwrap();
    let (mut rest, mut events) = (bytes.as_slice(), Vec::new());
    while !rest.is_empty() {
        let number = |at: usize| u32::from_le_bytes(rest[at..at + 4].try_into().unwrap());
        let len = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
        assert_eq!(number(8), masked_crc(&rest[..8]));
        assert_eq!(number(12 + len), masked_crc(&rest[12..12 + len]));
        events.push(fields(&rest[12..12 + len]));
        rest = &rest[16 + len..];
    }
    assert_eq!(events[0][1].2, b"brain.Event:2");
    let mut found = Vec::new();
    for event in &events[1..] {
        let (time, step, summary) = (event[0].2, event[1].1, event[2].2);
        assert!(f64::from_le_bytes(time.try_into().unwrap()) > 1.7e9);
        assert_eq!((event[1].0, event[2].0), (2, 5));
        for (_, _, value) in fields(summary) {
            let value = fields(value);
            let number = f32::from_le_bytes(value[1].2.try_into().unwrap());
            found.push((step, str::from_utf8(value[0].2).unwrap().to_owned(), number));
        }
    }
    let of = |tag: &str| -> Vec<(u64, f32)> {
        found.iter().filter(|(_, t, _)| t == tag).map(|&(step, _, number)| (step, number)).collect()
    };
    assert_eq!(of("eval/loss"), [(0, 3.25), (2, 2.75), (300, 2.75)]);
    assert_eq!(of("train/loss"), [(1, 2.984_375), (2, 2.968_75), (300, -1.6875)]);
    assert_eq!(of("train/learning_rate"), [1, 2, 300].map(|step| (step, 1e-4)));
    assert_eq!(of("train/gradient_norm"), [1, 2, 300].map(|step| (step, 0.5)));
    assert_eq!(of("train/tokens_per_second"), [1, 2, 300].map(|step| (step, 200.0)));
}

#[test]
fn lines_are_there_as_soon_as_the_step_is() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("training.jsonl");
    std::fs::write(&path, "of another run").unwrap();
    let mut log = StepLog::create(&path).unwrap();
    for step in 1..4 {
        log.step(&report(step)).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text.lines().count(), step);
        let line: serde_json::Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
        assert_eq!((&line["step"], &line["tokens"]), (&step.into(), &300.into()));
        assert_eq!(line["held_out_loss"].is_null(), step % 2 == 1);
    }
    let error = StepLog::create(&directory.path().join("no/where")).unwrap_err().to_string();
    assert!(error.contains("no/where"), "{error}");
}
