//! Checkpoints of compressed-tensors, as llm-compressor writes them; [`write`] does so too.
//! `docs/formats/compressed-tensors.md` shows the layouts.

pub(super) mod write;

use bevel_base::grouped::float4::{E2M1_LEVELS, e8m0};
use bevel_base::grouped::{Coding, Zeros};
use bevel_base::{DType, GroupedMatrix, pack};

use super::bitstream;
use super::fp8::Scales;
use super::gptq::group_size;
use super::module::{Module, transpose};
use super::settings::{Settings, groups_in_words};
use crate::Result;

pub(super) const PARTS: &[&str] = &[
    "weight_packed",
    "weight",
    "weight_scale",
    "weight_zero_point",
    "weight_global_scale",
    "weight_shape",
    "weight_g_idx",
    "input_scale",
    "input_zero_point",
    "input_global_scale",
    "output_scale",
    "output_zero_point",
];

#[derive(Clone, Debug)]
pub(super) struct CompressedTensors {
    /// Of each of `config_groups`, whatever modules it is for: which it is, shapes say.
    weights: Vec<Weights>,
}

#[derive(Clone, Debug)]
struct Weights {
    bits: u32,
    float: bool,
    group_size: Option<usize>,
    block: Option<[usize; 2]>,
}

/// Where the codes of a module lie.
enum Storage {
    /// Integers in 32-bit words.
    Packed,
    /// Two 4-bit floats a byte.
    Float4,
    /// A signed byte each.
    Int8,
    /// An 8-bit float each.
    Float8,
}

/// How integers lie in the words of a row.
#[derive(Clone, Copy)]
enum Packing {
    /// One stream of bits.
    Dense,
    /// As many as fit whole in each word, as releases before 2026 had it; where 32 is a multiple
    /// of the bits that is the same.
    Whole,
}

impl CompressedTensors {
    pub(super) fn from_settings(
        settings: &Settings<'_>,
        warnings: &mut Vec<String>,
    ) -> Result<Self, String> {
        if let Some(sparsity) = settings.object("sparsity_config")?
            && let Some(format) = sparsity.text("format")?.filter(|&format| format != "dense")
        {
            let reason = format!("is `{format}`; bevel reads dense weights only");
            return Err(sparsity.wrong("format", &reason));
        }
        if let Some(transforms) = settings.object("transform_config")?
            && transforms
                .object("config_groups")?
                .is_some_and(|groups| groups.entries().next().is_some())
        {
            let reason = "rotates activations while the model runs, which bevel does not";
            return Err(settings.wrong("transform_config", reason));
        }
        if settings.has("kv_cache_scheme") {
            warnings
                .push("keys and values are meant to be cached in 8 bits; they are not".to_owned());
        }
        let groups = settings.object("config_groups")?;
        let groups = groups.ok_or_else(|| settings.wrong("config_groups", "is missing"))?;
        let mut weights = Vec::new();
        let mut activations = false;
        for (name, _) in groups.entries() {
            let group = groups.object(name)?.ok_or_else(|| groups.wrong(name, "is null"))?;
            activations |= group.has("input_activations") || group.has("output_activations");
            if let Some(own) = group.object("weights")? {
                weights.push(Weights::from_settings(&own)?);
            }
        }
        if activations {
            warnings.push("activations are meant to be quantized; only the weights are".to_owned());
        }
        Ok(Self { weights })
    }

    pub(super) fn name(&self) -> String {
        let mut kinds: Vec<String> = self.weights.iter().map(Weights::name).collect();
        kinds.dedup();
        format!("compressed-tensors, {}", kinds.join("; "))
    }

    fn storage(module: &Module<'_>) -> Result<Option<Storage>> {
        let scaled = module.has("weight_scale");
        Ok(match (module.dtype("weight_packed"), module.dtype("weight")) {
            (Some(DType::U8), _) => Some(Storage::Float4),
            (Some(_), _) => Some(Storage::Packed),
            (None, Some(DType::I8)) if scaled => Some(Storage::Int8),
            (None, Some(DType::F8_E4M3)) if scaled => Some(Storage::Float8),
            (None, _) if module.has("compressed") || module.has("bitmask") => {
                let part = if module.has("compressed") { "compressed" } else { "bitmask" };
                return Err(module.error(part, "bevel reads no sparse weights"));
            }
            _ => None,
        })
    }

    pub(super) fn shape(&self, module: &Module<'_>) -> Result<Option<[usize; 2]>> {
        match Self::storage(module)? {
            None => Ok(None),
            Some(Storage::Packed) => Ok(Some(packed_shape(module)?)),
            Some(Storage::Float4) => {
                let [rows, bytes] = module.matrix("weight_packed")?;
                Ok(Some([rows, bytes.saturating_mul(2)]))
            }
            Some(Storage::Int8 | Storage::Float8) => module.matrix("weight").map(Some),
        }
    }

    pub(super) fn read(&self, module: &Module<'_>) -> Result<GroupedMatrix> {
        match Self::storage(module)? {
            None => {
                Err(module.error("weight_packed", "it is missing; the module is not quantized"))
            }
            Some(Storage::Packed) => self.read_packed(module),
            Some(Storage::Float4) => read_float4(module),
            Some(storage) => self.read_bytes(module, &storage),
        }
    }

    /// Eight bits a weight, not packed.
    fn read_bytes(&self, module: &Module<'_>, storage: &Storage) -> Result<GroupedMatrix> {
        let block = self.weights.iter().find_map(|weights| weights.block);
        let scales = Scales::read(module, "weight_scale", block)?;
        let codes = module.view("weight")?.data();
        if let Storage::Float8 = storage {
            return Ok(scales.matrix(Coding::Float8, codes.to_vec()));
        }
        // Signed codes and zero points both move up by half of the range.
        let mut zeros = Zeros::Symmetric;
        if module.has("weight_zero_point") {
            let dims = module.view("weight_scale")?.shape().dims().to_vec();
            module.expect("weight_zero_point", &dims)?;
            let stored = module.typed("weight_zero_point", &[DType::I8])?.data();
            let groups = scales.cols.div_ceil(scales.group_size);
            let stored = stored.iter().map(|&zero| zero ^ 0x80);
            zeros = match stored.len() {
                1 => Zeros::new(8, stored.cycle().take(scales.rows).collect()),
                n if n == scales.rows * groups => Zeros::new(8, stored.collect()),
                _ => {
                    return Err(
                        module.error("weight_zero_point", "zero points of blocks are not read")
                    );
                }
            };
        }
        let codes = codes.iter().map(|&code| code ^ 0x80).collect();
        Ok(scales.matrix(Coding::Integer { bits: 8, zeros }, codes))
    }

    fn read_packed(&self, module: &Module<'_>) -> Result<GroupedMatrix> {
        let [rows, cols] = packed_shape(module)?;
        let words = module.words("weight_packed")?;
        let Some((weights, packing)) = self.packing(words.cols, cols) else {
            let names: Vec<String> = self.weights.iter().map(Weights::name).collect();
            let reason = format!(
                "{} words for {cols} columns; `config.json` has {}",
                words.cols,
                names.join("; ")
            );
            return Err(module.error("weight_packed", reason));
        };
        let bits = weights.bits;
        let [_, groups] = module.matrix("weight_scale")?;
        module.expect("weight_scale", &[rows, groups])?;
        let fits = |size: &Option<usize>| cols.div_ceil(size.unwrap_or(cols)) == groups;
        let of_bits = self.weights.iter().filter(|weights| weights.bits == bits);
        let configured = of_bits.map(|weights| weights.group_size).find(fits);
        let group_size = group_size(cols, groups, configured.unwrap_or(weights.group_size))
            .map_err(|reason| module.error("weight_scale", reason))?;

        let mut codes = vec![0; rows * cols];
        for (row, codes) in codes.chunks_exact_mut(cols).enumerate() {
            packing.unpack(words.row(row), bits, codes);
        }
        let zeros = match module.has("weight_zero_point") {
            true => Zeros::new(bits, zeros(module, rows, groups, bits, packing)?),
            false => Zeros::Symmetric,
        };
        let group_of = module.group_of("weight_g_idx", cols, group_size)?;
        let (coding, scales) = (Coding::Integer { bits, zeros }, module.floats("weight_scale")?);
        Ok(GroupedMatrix { rows, cols, group_size, coding, codes, scales, group_of })
    }

    /// The first of the configured weights that `cols` columns in so many words can be.
    fn packing(&self, words: usize, cols: usize) -> Option<(&Weights, Packing)> {
        let kinds = [Packing::Dense, Packing::Whole].into_iter();
        kinds.flat_map(|packing| self.weights.iter().map(move |weights| (weights, packing))).find(
            |(weights, packing)| !weights.float && packing.words(cols, weights.bits) == Some(words),
        )
    }
}

impl Weights {
    fn from_settings(settings: &Settings<'_>) -> Result<Self, String> {
        let float = match settings.text("type")?.map(str::to_lowercase).as_deref() {
            None | Some("int") => false,
            Some("float") => true,
            Some(other) => {
                let reason = format!("is `{other}`; expected `int` or `float`");
                return Err(settings.wrong("type", &reason));
            }
        };
        let allowed: &[u32] = if float { &[4, 8] } else { &[1, 2, 3, 4, 5, 6, 7, 8] };
        let bits = match settings.has("num_bits") {
            true => settings.bits("num_bits", allowed)?,
            false => 8,
        };
        let group_size = settings.group_size("group_size")?;
        Ok(Self { bits, float, group_size, block: settings.block("block_structure")? })
    }

    fn name(&self) -> String {
        let kind = match (self.float, self.bits, self.group_size) {
            (true, 4, Some(16)) => "NVFP4".to_owned(),
            (true, 4, Some(32)) => "MXFP4".to_owned(),
            (true, bits, _) => format!("{bits}-bit floats"),
            (false, bits, _) => format!("{bits} bits"),
        };
        match self.block {
            Some([tall, wide]) => format!("{kind}, blocks of [{tall}, {wide}]"),
            None => format!("{kind}, {}", groups_in_words(self.group_size)),
        }
    }
}

impl Packing {
    /// Words for a row.
    fn words(self, cols: usize, bits: u32) -> Option<usize> {
        match self {
            Packing::Dense => bitstream::words(cols, bits),
            Packing::Whole => Some(cols.div_ceil((32 / bits) as usize)),
        }
    }

    fn unpack(self, words: impl IntoIterator<Item = u32>, bits: u32, out: &mut [u8]) {
        match self {
            Packing::Dense => bitstream::unpack(words, bits, out),
            Packing::Whole => {
                let in_word = (32 / bits) as usize;
                for (word, out) in words.into_iter().zip(out.chunks_mut(in_word)) {
                    bitstream::unpack([word], bits, out);
                }
            }
        }
    }
}

/// What `weight_shape` says, held against the packed rows.
fn packed_shape(module: &Module<'_>) -> Result<[usize; 2]> {
    let [packed_rows, words] = module.matrix("weight_packed")?;
    let shape = module.integers("weight_shape")?;
    let dims: Vec<usize> = shape.iter().filter_map(|&dim| dim.try_into().ok()).collect();
    match dims[..] {
        // A word holds at most 32 codes.
        [rows, cols]
            if shape.len() == 2
                && rows == packed_rows
                && cols > 0
                && cols <= words.saturating_mul(32) =>
        {
            Ok([rows, cols])
        }
        _ => {
            let reason =
                format!("it says {shape:?}, but [{packed_rows}, {words}] words are packed");
            Err(module.error("weight_shape", reason))
        }
    }
}

/// `[rows, groups]`, packed along the rows or, by old releases, a byte each.
fn zeros(
    module: &Module<'_>,
    rows: usize,
    groups: usize,
    bits: u32,
    packing: Packing,
) -> Result<Vec<u8>> {
    let part = "weight_zero_point";
    if module.dtype(part) == Some(DType::I8) {
        module.expect(part, &[rows, groups])?;
        let half = 1u8 << (bits - 1);
        let stored = module.view(part)?.data().iter();
        return Ok(stored.map(|&zero| zero.wrapping_add(half)).collect());
    }
    let words = module.words(part)?;
    module.expect(part, &[packing.words(rows, bits).unwrap_or(0), groups])?;
    let mut zeros = vec![0; groups * rows];
    for (group, zeros) in zeros.chunks_exact_mut(rows).enumerate() {
        packing.unpack((0..words.rows).map(|word| words.at(word, group)), bits, zeros);
    }
    Ok(transpose(&zeros, groups, rows))
}

/// NVFP4 and MXFP4: they differ in their scales.
fn read_float4(module: &Module<'_>) -> Result<GroupedMatrix> {
    let [rows, bytes] = module.matrix("weight_packed")?;
    let packed = module.typed("weight_packed", &[DType::U8])?.data();
    let cols = 2 * bytes;
    let [_, groups] = module.matrix("weight_scale")?;
    module.expect("weight_scale", &[rows, groups])?;
    let stored = module.typed("weight_scale", &[DType::F8_E4M3, DType::U8])?;
    let (group_size, scales): (usize, Vec<f32>) = match stored.dtype() {
        DType::U8 => (32, stored.data().iter().map(|&code| e8m0(code)).collect()),
        _ => {
            let global = module.number("weight_global_scale")?;
            (16, stored.data().iter().map(|&code| pack::e4m3(code) / global).collect())
        }
    };
    if cols.div_ceil(group_size) != groups {
        let reason = format!("{groups} scales for {cols} columns; expected groups of {group_size}");
        return Err(module.error("weight_scale", reason));
    }
    let codes = packed.iter().flat_map(|byte| [byte & 15, byte >> 4]).collect();
    let coding = Coding::Levels(E2M1_LEVELS);
    Ok(GroupedMatrix { rows, cols, group_size, coding, codes, scales, group_of: None })
}
