//! Event files as TensorBoard reads them: TFRecords, each an `Event` of protobuf with a step's figures.
//!
//! | bytes | of a record |
//! |---|---|
//! | 8 | length of the event |
//! | 4 | masked CRC-32C of these 8 bytes |
//! | length | the event |
//! | 4 | masked CRC-32C of the event |
//!
//! Numbers are little-endian.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::{Error, Result, StepReport};

/// Writes the figures of a run into a directory, step by step.
#[derive(Debug)]
pub struct EventWriter {
    file: File,
    path: PathBuf,
}

impl EventWriter {
    /// A new file in `directory`, which is made where it is missing.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub fn create(directory: &Path) -> Result<Self> {
        let failed = |error| Error::Io { path: directory.display().to_string(), error };
        std::fs::create_dir_all(directory).map_err(failed)?;
        // TensorBoard knows event files by their names, and reads them in the order of these.
        let (seconds, process) = (now() as u64, std::process::id());
        let path = directory.join(format!("events.out.tfevents.{seconds:010}.bevel.{process}"));
        let mut writer = Self { file: File::create(&path).map_err(failed)?, path };
        let mut event = Message::default();
        event.double(1, now());
        event.bytes(3, b"brain.Event:2");
        writer.record(&event)?;
        Ok(writer)
    }

    /// The figures of a step.
    ///
    /// # Errors
    /// Where they cannot be written.
    pub fn step(&mut self, report: &StepReport) -> Result<()> {
        let mut scalars = vec![
            ("train/loss", report.loss),
            ("train/learning_rate", report.learning_rate),
            ("train/gradient_norm", report.gradient_norm),
            ("train/tokens_per_second", report.tokens_per_second()),
        ];
        scalars.extend(report.held_out.map(|loss| ("eval/loss", loss)));
        self.scalars(report.step, &scalars)
    }

    /// Numbers with their tags.
    ///
    /// # Errors
    /// As [`EventWriter::step`].
    pub fn scalars(&mut self, step: usize, scalars: &[(&str, f64)]) -> Result<()> {
        let mut summary = Message::default();
        for (tag, number) in scalars {
            let mut value = Message::default();
            value.bytes(1, tag.as_bytes());
            value.float(2, *number as f32);
            summary.bytes(1, &value.0);
        }
        let mut event = Message::default();
        event.double(1, now());
        event.integer(2, step as u64);
        event.bytes(5, &summary.0);
        self.record(&event)
    }

    fn record(&mut self, Message(event): &Message) -> Result<()> {
        let len = (event.len() as u64).to_le_bytes();
        let record = [
            len.as_slice(),
            &masked_crc(&len).to_le_bytes(),
            event,
            &masked_crc(event).to_le_bytes(),
        ];
        let written = self.file.write_all(&record.concat());
        written.map_err(|error| Error::Io { path: self.path.display().to_string(), error })
    }
}

/// Seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}

/// A message of protobuf, field by field.
#[derive(Debug, Default)]
struct Message(Vec<u8>);

impl Message {
    /// A field's number and wire type, and any other unsigned number: seven bits a byte.
    fn varint(&mut self, mut number: u64) {
        while number > 127 {
            self.0.push(number as u8 | 128);
            number >>= 7;
        }
        self.0.push(number as u8);
    }

    fn integer(&mut self, field: u64, value: u64) {
        self.varint(field << 3);
        self.varint(value);
    }

    fn double(&mut self, field: u64, value: f64) {
        self.varint(field << 3 | 1);
        self.0.extend(value.to_le_bytes());
    }

    fn bytes(&mut self, field: u64, value: &[u8]) {
        self.varint(field << 3 | 2);
        self.varint(value.len() as u64);
        self.0.extend(value);
    }

    fn float(&mut self, field: u64, value: f32) {
        self.varint(field << 3 | 5);
        self.0.extend(value.to_le_bytes());
    }
}

/// CRC-32C (Castagnoli), which TFRecords turn and shift so that a sum over sums says something.
fn masked_crc(bytes: &[u8]) -> u32 {
    let crc = !bytes.iter().fold(!0u32, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            crc >> 1 ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 }
        })
    });
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}
