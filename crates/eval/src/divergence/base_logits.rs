//! Files of a base model's predictions, so that many models are compared with one run of it.
//!
//! # bevel's own file
//!
//! Little-endian, without padding:
//!
//! ```text
//! "BVLOGITS" | version u32 = 1 | vocabulary u32 | context u32 | windows u32 | KV type u32 | BOS u32
//! model digest [32] | tokens u32 [windows · context] | checksum [8]
//! row [windows · (context − 1 − context / 2)]:
//!     surprise of the token that follows f64 | codes u16 [vocabulary] | checksum [8]
//! ```
//!
//! BOS is 2³² − 1 where there is none. A checksum is the first eight bytes of the SHA-256 of what stands
//! before it, from the file's beginning or the row's.
//!
//! A code c stands for a logit that lies d = 40 · (c / 65535)² below the greatest one; what lies more than
//! 40 nats below, e⁻⁴⁰ times as likely, is put there. Rounding moves d by at most
//!
//! ```text
//! δ(d) = √(40 d) / 65535 ≈ 1e-4 · √d
//! ```
//!
//! so likely tokens are the most exact, and the greatest is exact. Rows are normalised anew when they are
//! read, so that a row's KL divergence is that of a distribution, never negative, and moves by at most
//! E[δ · |ln(p / q) − KL|] ≤ 1e-4 · √(E[d] · Var ln(p / q)) nats, expectations over p. Errors of different
//! rows have no common sign; the mean over a text moves by far less than 1e-5 (`bevel eval` finds 1e-7).
//!
//! # llama.cpp's file
//!
//! What `llama-perplexity --kl-divergence-base FILE` writes: `"_logits_"`, context, vocabulary and windows
//! as u32, all tokens, then for each window its rows: scale and minimum as f32, and a u16 code for each
//! token, log p = scale · code + minimum, down to 16 nats below the greatest. As in llama.cpp, tokens
//! with log p ≤ −16 are left out of the sum, and what is left is not normalised anew.

use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use bevel_formats::AtomicFile;
use bevel_kernels::{Cpu, KvType, log_sum_exp};
use sha2::{Digest, Sha256};

use super::ModelDigest;
use super::rows::{BaseRow, argmax};
use crate::{Error, Result, Text};

const MAGIC: &[u8; 8] = b"BVLOGITS";
const LLAMA_MAGIC: &[u8; 8] = b"_logits_";
const VERSION: u32 = 1;
const NO_BOS: u32 = u32::MAX;
/// Bytes of a checksum.
const CHECKSUM: usize = 8;
/// Nats below the greatest logit that codes reach.
const REACH: f32 = 40.0;
/// The code of a logit that lies `REACH` below.
const LAST_CODE: f32 = 65535.0;

/// An open file of a base model's predictions.
#[derive(Debug)]
pub struct BaseLogits {
    path: PathBuf,
    file: File,
    header: Header,
    /// Where the rows begin.
    start: u64,
}

/// What a file says before its rows.
#[derive(Debug)]
pub(super) struct Header {
    pub(super) vocabulary: usize,
    pub(super) context: usize,
    /// Tokens of all windows, as the text has them.
    pub(super) tokens: Vec<u32>,
    /// What only bevel's own files tell.
    pub(super) origin: Option<Origin>,
}

/// The model and the settings that gave the predictions.
#[derive(Debug)]
pub(super) struct Origin {
    pub(super) model: ModelDigest,
    pub(super) kv_type: KvType,
    pub(super) bos: Option<u32>,
}

impl BaseLogits {
    /// Whether `path` is a file of logits, bevel's or llama.cpp's, by its first bytes.
    pub fn is_one(path: &Path) -> bool {
        let mut magic = [0; 8];
        let read =
            path.is_file().then(|| File::open(path).and_then(|mut f| f.read_exact(&mut magic)));
        matches!(read, Some(Ok(()))) && [MAGIC, LLAMA_MAGIC].contains(&&magic)
    }

    /// Opens a file and checks its header and length.
    ///
    /// # Errors
    /// [`Error::BaseLogits`] where it is no file of logits, truncated or damaged.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(io("open", path))?;
        let len = file.metadata().map_err(io("read", path))?.len();
        let mut reader = Reader { path, inner: BufReader::new(&file), hasher: Sha256::new() };
        let magic: [u8; 8] = reader.bytes()?;
        let header = match &magic {
            MAGIC => Header::read(&mut reader, len)?,
            LLAMA_MAGIC => Header::read_llama(&mut reader, len)?,
            _ => {
                return Err(refused(
                    path,
                    "it is no file of logits, neither bevel's nor llama.cpp's",
                ));
            }
        };
        let start = reader.inner.stream_position().map_err(io("read", path))?;
        drop(reader);
        Ok(Self { path: path.to_owned(), file, header, start })
    }

    /// Logits of a row.
    pub fn vocabulary(&self) -> usize {
        self.header.vocabulary
    }

    /// Tokens of a window.
    pub fn context(&self) -> usize {
        self.header.context
    }

    /// Checks that the predictions are those of `model`.
    ///
    /// # Errors
    /// [`Error::BaseLogits`] where they are another's, or where the file, llama.cpp's, does not say whose
    /// they are.
    pub fn check_model(&self, model: &ModelDigest) -> Result<()> {
        match &self.header.origin {
            Some(origin) if origin.model == *model => Ok(()),
            Some(_) => Err(self.refused(
                "it holds the predictions of another model than the base; delete it, or name another file",
            )),
            None => Err(self.refused(
                "llama.cpp's files do not say which model they come from; give the file itself as the base",
            )),
        }
    }

    /// Checks that the predictions are those that `context`, `kv_type`, `text` and a vocabulary of `vocab`
    /// ask for; the file may go on after them.
    pub(super) fn check(
        &self,
        context: usize,
        kv_type: KvType,
        text: &Text,
        vocab: usize,
    ) -> Result<()> {
        let header = &self.header;
        if header.vocabulary != vocab {
            return Err(self.refused(format!(
                "its rows have {} logits, but the model's have {vocab}; base and model must have one vocabulary",
                header.vocabulary
            )));
        }
        if header.context != context {
            return Err(self.refused(format!(
                "its windows have {} tokens, not {context}; give --ctx {}",
                header.context, header.context
            )));
        }
        if let Some(origin) = &header.origin
            && (origin.kv_type != kv_type || origin.bos != text.bos)
        {
            return Err(self.refused(
                "it was made with another type of keys and values, or another token that begins a text; delete it, or name another file",
            ));
        }
        let wanted = &text.tokens[..text.tokens.len() / context * context];
        if let Some(at) = wanted.iter().zip(&header.tokens).position(|(a, b)| a != b) {
            return Err(self.refused(format!(
                "it is about another text: token {at} is {} there and {} here; delete it, or name another file",
                header.tokens[at], wanted[at]
            )));
        }
        if wanted.len() > header.tokens.len() {
            return Err(self.refused(format!(
                "it ends after {} tokens, but the text has {}; delete it, or give --tokens {}",
                header.tokens.len(),
                text.tokens.len(),
                header.tokens.len()
            )));
        }
        Ok(())
    }

    /// Bytes of a row.
    pub(super) fn row_bytes(&self) -> usize {
        self.header.row_bytes()
    }

    /// Reads the rows from `first` on into `rows`, a whole number of them.
    pub(super) fn read(&self, first: usize, rows: &mut [u8]) -> Result<()> {
        let at = self.start + first as u64 * self.row_bytes() as u64;
        let mut file = &self.file;
        file.seek(SeekFrom::Start(at))
            .and_then(|_| file.read_exact(rows))
            .map_err(io("read", &self.path))
    }

    /// Unpacks row number `number`, which `bytes` holds, into `logits`; `next` is the token that follows.
    pub(super) fn unpack<'l>(
        &self,
        number: usize,
        bytes: &[u8],
        next: u32,
        logits: &'l mut [f32],
    ) -> Result<BaseRow<'l>> {
        let row = match self.header.origin {
            Some(_) => unpack(bytes, logits),
            None => unpack_llama(bytes, next, logits),
        };
        row.ok_or_else(|| {
            self.refused(format!(
                "row {number} is damaged: the file changed after it was written; delete it"
            ))
        })
    }

    fn refused(&self, reason: impl Into<String>) -> Error {
        refused(&self.path, reason)
    }
}

impl Header {
    fn rows_of_window(&self) -> usize {
        self.context - 1 - self.context / 2
    }

    fn row_bytes(&self) -> usize {
        match self.origin {
            Some(_) => 8 + 2 * self.vocabulary + CHECKSUM,
            None => 8 + 2 * self.vocabulary.next_multiple_of(2),
        }
    }

    fn read(reader: &mut Reader<'_>, len: u64) -> Result<Self> {
        let version = reader.u32()?;
        if version != VERSION {
            return Err(reader.refused(format!(
                "version {version} of the format is not the one that this bevel reads, {VERSION}; delete the file"
            )));
        }
        let (vocabulary, context, windows) = (reader.u32()?, reader.u32()?, reader.u32()?);
        let kv_type = reader.u32()?;
        let kv_type = KV_TYPES.get(kv_type as usize).copied();
        let bos = reader.u32()?;
        let model = ModelDigest(reader.bytes()?);
        let kv_type =
            kv_type.ok_or_else(|| reader.refused("the header is damaged; delete the file"))?;
        let origin = Origin { model, kv_type, bos: (bos != NO_BOS).then_some(bos) };
        let mut header = Self::sized(reader, len, vocabulary, context, windows, Some(origin))?;
        header.tokens = reader.tokens(context as usize * windows as usize)?;
        let expected = reader.hasher.clone().finalize();
        if reader.bytes::<CHECKSUM>()? != expected[..CHECKSUM] {
            return Err(reader.refused("the header is damaged; delete the file"));
        }
        Ok(header)
    }

    fn read_llama(reader: &mut Reader<'_>, len: u64) -> Result<Self> {
        let (context, vocabulary, windows) = (reader.u32()?, reader.u32()?, reader.u32()?);
        let mut header = Self::sized(reader, len, vocabulary, context, windows, None)?;
        header.tokens = reader.tokens(context as usize * windows as usize)?;
        Ok(header)
    }

    /// A header without tokens, if a file of `len` bytes is as long as the numbers in it say.
    fn sized(
        reader: &Reader<'_>,
        len: u64,
        vocabulary: u32,
        context: u32,
        windows: u32,
        origin: Option<Origin>,
    ) -> Result<Self> {
        if context < 4 || vocabulary == 0 {
            return Err(reader.refused(format!(
                "its header is damaged: windows of {context} tokens, a vocabulary of {vocabulary}"
            )));
        }
        let fixed = if origin.is_some() { 64 + CHECKSUM } else { 20 } as u64;
        let header = Self {
            vocabulary: vocabulary as usize,
            context: context as usize,
            tokens: Vec::new(),
            origin,
        };
        let window = (header.rows_of_window() as u64)
            .checked_mul(header.row_bytes() as u64)
            .and_then(|rows| rows.checked_add(4 * u64::from(context)));
        let expected = window
            .and_then(|window| window.checked_mul(u64::from(windows)))
            .and_then(|windows| windows.checked_add(fixed));
        if expected != Some(len) {
            return Err(reader.refused(format!(
                "it has {len} bytes, but {windows} windows of {context} tokens over a vocabulary of {vocabulary} take {}; it is truncated or damaged, delete it",
                expected.map_or("more than there can be".to_owned(), |bytes| bytes.to_string())
            )));
        }
        Ok(header)
    }
}

/// KV types by their number in the file.
const KV_TYPES: [KvType; 7] = [
    KvType::F32,
    KvType::F16,
    KvType::BF16,
    KvType::Q8_0 { rotated: false },
    KvType::Q8_0 { rotated: true },
    KvType::Q4_0 { rotated: false },
    KvType::Q4_0 { rotated: true },
];

/// Writes the predictions of a base model row by row.
pub(super) struct Writer {
    file: AtomicFile,
    rows: Vec<u8>,
    row_bytes: usize,
}

impl Writer {
    pub(super) fn create(path: &Path, header: &Header) -> Result<Self> {
        let Some(origin) = &header.origin else {
            return Err(refused(path, "only bevel's own format is written"));
        };
        let kv_type = KV_TYPES.iter().position(|&t| t == origin.kv_type);
        let kv_type = kv_type.expect("every type has a number");
        let windows = header.tokens.len() / header.context;
        let mut bytes = MAGIC.to_vec();
        let numbers = [VERSION as usize, header.vocabulary, header.context, windows, kv_type];
        for number in numbers {
            let number = u32::try_from(number)
                .map_err(|_| refused(path, format!("{number} does not fit into the format")))?;
            bytes.extend(number.to_le_bytes());
        }
        bytes.extend(origin.bos.unwrap_or(NO_BOS).to_le_bytes());
        bytes.extend(origin.model.0);
        header.tokens.iter().for_each(|token| bytes.extend(token.to_le_bytes()));
        bytes.extend(checksum(&bytes));
        let mut file = AtomicFile::create(path)?;
        file.write_all(&bytes).map_err(io("write", path))?;
        Ok(Self { file, rows: Vec::new(), row_bytes: header.row_bytes() })
    }

    /// Appends rows of `logits`, of which `next` are the tokens that follow, and returns their surprises.
    pub(super) fn append(&mut self, cpu: &Cpu, logits: &[f32], next: &[u32]) -> Result<Vec<f64>> {
        let vocab = (self.row_bytes - 8 - CHECKSUM) / 2;
        self.rows.resize(next.len() * self.row_bytes, 0);
        cpu.pool().run_chunks(&mut self.rows, self.row_bytes, |row, bytes| {
            pack(cpu, &logits[row * vocab..][..vocab], next[row], bytes);
        });
        let path = self.file.path().to_owned();
        self.file.write_all(&self.rows).map_err(io("write", &path))?;
        let nats = self.rows.chunks(self.row_bytes).map(|row| {
            let mut nats = [0; 8];
            nats.copy_from_slice(&row[..8]);
            f64::from_le_bytes(nats)
        });
        Ok(nats.collect())
    }

    pub(super) fn finish(self) -> Result<()> {
        Ok(self.file.finish()?)
    }
}

/// Packs one row.
fn pack(cpu: &Cpu, logits: &[f32], next: u32, bytes: &mut [u8]) {
    let (content, sum) = bytes.split_at_mut(bytes.len() - CHECKSUM);
    let (nats, codes) = content.split_at_mut(8);
    let surprise = log_sum_exp(cpu, logits) - f64::from(logits[next as usize]);
    nats.copy_from_slice(&surprise.to_le_bytes());
    let highest = logits[argmax(logits)];
    for (code, &logit) in codes.as_chunks_mut::<2>().0.iter_mut().zip(logits) {
        // Casts saturate: what lies beyond the reach gets the last code.
        let root = ((highest - logit) * (1.0 / REACH)).sqrt();
        *code = ((root * LAST_CODE + 0.5) as u16).to_le_bytes();
    }
    sum.copy_from_slice(&checksum(content));
}

/// Unpacks one row; `None` where its checksum does not hold.
fn unpack<'l>(bytes: &[u8], logits: &'l mut [f32]) -> Option<BaseRow<'l>> {
    let (content, sum) = bytes.split_at(bytes.len() - CHECKSUM);
    let (nats, codes) = content.split_first_chunk()?;
    if checksum(content) != sum {
        return None;
    }
    for (logit, &code) in logits.iter_mut().zip(codes.as_chunks().0) {
        let root = f32::from(u16::from_le_bytes(code)) * (1.0 / LAST_CODE);
        *logit = -REACH * (root * root);
    }
    Some(BaseRow { logits, nats: Some(f64::from_le_bytes(*nats)), as_they_are: false })
}

/// Unpacks one row of llama.cpp's; `None` where it holds no numbers.
fn unpack_llama<'l>(bytes: &[u8], next: u32, logits: &'l mut [f32]) -> Option<BaseRow<'l>> {
    let (&scale, rest) = bytes.split_first_chunk()?;
    let (&minimum, codes) = rest.split_first_chunk()?;
    let (scale, minimum) = (f32::from_le_bytes(scale), f32::from_le_bytes(minimum));
    if !(scale.is_finite() && scale >= 0.0 && minimum.is_finite()) {
        return None;
    }
    let codes = codes.as_chunks().0;
    let log_p = |code: [u8; 2]| scale * f32::from(u16::from_le_bytes(code)) + minimum;
    for (logit, &code) in logits.iter_mut().zip(codes) {
        let log_p = log_p(code);
        *logit = if log_p > -16.0 { log_p } else { f32::NEG_INFINITY };
    }
    let nats = -f64::from(log_p(codes[next as usize]));
    Some(BaseRow { logits, nats: Some(nats), as_they_are: true })
}

fn checksum(bytes: &[u8]) -> [u8; CHECKSUM] {
    let digest = Sha256::digest(bytes);
    std::array::from_fn(|i| digest[i])
}

/// Reads a header and hashes it on the way.
struct Reader<'a> {
    path: &'a Path,
    inner: BufReader<&'a File>,
    hasher: Sha256,
}

impl Reader<'_> {
    fn fill(&mut self, bytes: &mut [u8]) -> Result<()> {
        self.inner.read_exact(bytes).map_err(|error| match error.kind() {
            std::io::ErrorKind::UnexpectedEof => {
                self.refused("it ends within its header; delete it")
            }
            _ => io("read", self.path)(error),
        })?;
        self.hasher.update(bytes);
        Ok(())
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.bytes()?))
    }

    /// `count` token ids; the file is known to be long enough for them.
    fn tokens(&mut self, count: usize) -> Result<Vec<u32>> {
        let mut bytes = vec![0; 4 * count];
        self.fill(&mut bytes)?;
        Ok(bytes.as_chunks::<4>().0.iter().map(|&token| u32::from_le_bytes(token)).collect())
    }

    fn refused(&self, reason: impl Into<String>) -> Error {
        refused(self.path, reason)
    }
}

fn refused(path: &Path, reason: impl Into<String>) -> Error {
    Error::BaseLogits { path: path.to_owned(), reason: reason.into() }
}

/// For `map_err`: the operating system refused to do `action` with `path`.
fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.to_owned();
    move |source| bevel_formats::Error::Io { action, path, source }.into()
}

#[cfg(test)]
mod tests {
    use bevel_kernels::kl_divergence;

    use super::*;

    /// Reproducible numbers, uniform in −1 … 1.
    fn random(seed: u64) -> impl FnMut() -> f32 {
        let mut state = seed;
        move || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        }
    }

    fn round_trip(logits: &[f32], next: u32) -> (Vec<f32>, f64) {
        let cpu = Cpu::new(1).unwrap();
        let mut bytes = vec![0; 8 + 2 * logits.len() + CHECKSUM];
        pack(&cpu, logits, next, &mut bytes);
        let mut unpacked = vec![0.0; logits.len()];
        let nats = unpack(&bytes, &mut unpacked).unwrap().nats.unwrap();
        (unpacked, nats)
    }

    #[test]
    fn every_logit_is_within_the_stated_distance() {
        let mut random = random(1);
        let logits: Vec<f32> = (0..50_000).map(|_| 18.0 * random() + 5.0).collect();
        let highest = logits[argmax(&logits)];
        let (unpacked, nats) = round_trip(&logits, 77);
        assert_eq!(argmax(&unpacked), argmax(&logits));
        let mut worst = 0.0f64;
        for (&logit, &found) in logits.iter().zip(&unpacked) {
            let d = f64::from(highest) - f64::from(logit);
            let bound = (40.0 * d).sqrt() / 65535.0;
            // Codes are rounded: beside the bound stands half a code squared, and f32's own rounding.
            let error = (-f64::from(found) - d).abs();
            assert!(error <= bound + 1e-8 + d * 3e-7, "{error:e} at {d}");
            worst = worst.max(error / bound.max(1e-6));
        }
        assert!(worst > 0.9, "the bound is larger than it must be: {worst}");
        assert!((nats - crate::nats(&logits, 77)).abs() < 1e-6);
    }

    #[test]
    fn divergence_moves_less_than_stated() {
        let cpu = Cpu::new(1).unwrap();
        let mut random = random(2);
        let (mut signed, mut rows) = (0.0, 0);
        for distance in [0.0, 0.01, 0.1, 1.0] {
            for _ in 0..20 {
                // A few likely tokens above a wide floor, as language models have it.
                let base: Vec<f32> =
                    (0..5000).map(|i| 4.0 * random() + 12.0 / (1 + i) as f32).collect();
                let other: Vec<f32> = base.iter().map(|x| x + distance * random()).collect();
                let exact = kl_divergence(&cpu, &base, &other).kl;
                let unpacked = round_trip(&base, 0).0;
                let error = kl_divergence(&cpu, &unpacked, &other).kl - exact;

                let sum = log_sum_exp(&cpu, &base);
                let shift = log_sum_exp(&cpu, &other) - sum;
                let highest = base[argmax(&base)];
                let bound: f64 = base
                    .iter()
                    .zip(&other)
                    .map(|(&b, &o)| {
                        let p = (f64::from(b) - sum).exp();
                        let log_ratio = f64::from(b) - f64::from(o) + shift;
                        let delta = (40.0 * f64::from(highest - b)).sqrt() / 65535.0;
                        p * delta * (log_ratio - exact).abs()
                    })
                    .sum();
                // Beside it stands the second order, δ² / 2, and the rounding of the sums.
                assert!(error.abs() <= bound + 5e-7, "{error:e} > {bound:e}");
                signed += error;
                rows += 1;
            }
        }
        assert!((signed / f64::from(rows)).abs() < 1e-6, "{signed}");
    }

    #[test]
    fn what_is_out_of_reach_is_put_at_its_end() {
        let (unpacked, _) = round_trip(&[f32::NEG_INFINITY, 3.0, -1e30, -37.0, 2.0], 1);
        assert_eq!(unpacked[..4], [-40.0, 0.0, -40.0, -40.0]);
        assert!((unpacked[4] + 1.0).abs() < 1e-4);
    }
}
