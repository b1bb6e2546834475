//! GPTQ checkpoints as AutoGPTQ and GPTQModel read and write them. `docs/formats/gptq.md` shows the layout.

use bevel_base::grouped::{Coding, Zeros};
use bevel_base::{DType, GroupedMatrix};
use serde_json::{Map, Value, json};

use super::bitstream;
use super::encode::{Tensor, floats, integers};
use super::format::{Codes, ModuleSpec, group_size_or_minus_one};
use super::module::{Module, transpose};
use super::settings::{Settings, groups_in_words};
use crate::Result;

pub(super) const PARTS: &[&str] = &["qweight", "qzeros", "scales", "g_idx"];

/// The widths whose codes are one stream of bits; others have layouts of single programs.
const BITS: &[u32] = &[2, 3, 4, 8];

/// How zero points are stored: less one, or as they are (`gptq_v2`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Version {
    First,
    Second,
}

#[derive(Clone, Debug)]
pub(super) struct Gptq {
    bits: u32,
    group_size: Option<usize>,
    version: Version,
}

impl Gptq {
    pub(super) fn from_settings(settings: &Settings<'_>) -> Result<Self, String> {
        let field = ["checkpoint_format", "format"].into_iter().find(|field| settings.has(field));
        let field = field.unwrap_or("checkpoint_format");
        let version = match settings.text(field)? {
            None | Some("gptq") => Version::First,
            Some("gptq_v2") => Version::Second,
            Some(other) => {
                let reason = format!("is `{other}`; bevel reads `gptq` and `gptq_v2`");
                return Err(settings.wrong(field, &reason));
            }
        };
        let bits = settings.bits("bits", BITS)?;
        let group_size = settings.group_size("group_size")?;
        Ok(Self { bits, group_size, version })
    }

    pub(super) fn name(&self) -> String {
        format!("GPTQ, {} bits, {}", self.bits, groups_in_words(self.group_size))
    }

    pub(super) fn shape(&self, module: &Module<'_>) -> Result<Option<[usize; 2]>> {
        if !module.has("qweight") {
            return Ok(None);
        }
        let (cols, _) = self.columns(module)?;
        Ok(Some([module.matrix("qweight")?[1], cols]))
    }

    /// Columns and bits. `dynamic` may give a module other bits than the rest; together with the
    /// columns that `g_idx` counts, the words of `qweight` say which.
    fn columns(&self, module: &Module<'_>) -> Result<(usize, u32)> {
        let [words, _] = module.matrix("qweight")?;
        let Some(g_idx) = module.info("g_idx") else {
            // 32 codes in as many words as bits; only whole ones are counted.
            let cols = words.checked_mul(32).unwrap_or(0) / self.bits as usize;
            return Ok((cols, self.bits));
        };
        let cols = g_idx.shape.len();
        let own = std::iter::once(&self.bits).chain(BITS);
        let fits = |bits: &&u32| bitstream::words(cols, **bits) == Some(words);
        match own.into_iter().find(fits) {
            Some(&bits) => Ok((cols, bits)),
            None => {
                let reason =
                    format!("{words} words for {cols} columns are not codes of {BITS:?} bits");
                Err(module.error("qweight", reason))
            }
        }
    }

    pub(super) fn read(&self, module: &Module<'_>) -> Result<GroupedMatrix> {
        let (cols, bits) = self.columns(module)?;
        let words = module.words("qweight")?;
        let rows = words.cols;
        let [groups, _] = module.matrix("scales")?;
        module.expect("scales", &[groups, rows])?;
        let group_size = group_size(cols, groups, self.group_size)
            .map_err(|reason| module.error("scales", reason))?;

        let mut codes = vec![0; rows * cols];
        for row in 0..rows {
            let column = (0..words.rows).map(|word| words.at(word, row));
            bitstream::unpack(column, bits, &mut codes[row * cols..][..cols]);
        }
        let scales = transpose(&module.floats("scales")?, groups, rows);
        let zeros = match module.has("qzeros") {
            true => Zeros::new(bits, self.zeros(module, rows, groups, bits)?),
            false => Zeros::Symmetric,
        };
        let group_of = module.group_of("g_idx", cols, group_size)?;
        let coding = Coding::Integer { bits, zeros };
        Ok(GroupedMatrix { rows, cols, group_size, coding, codes, scales, group_of })
    }

    /// `[rows, groups]`
    fn zeros(&self, module: &Module<'_>, rows: usize, groups: usize, bits: u32) -> Result<Vec<u8>> {
        let words = module.words("qzeros")?;
        module.expect("qzeros", &[groups, bitstream::words(rows, bits).unwrap_or(0)])?;
        // The first version subtracts one from every field, for whole words at a time, so that a zero
        // point of 0 borrows from its neighbour; adding in the same way undoes that. Fields of
        // 3 bits straddle words and are counted singly.
        let (of_words, of_fields): (u32, u8) = match (self.version, bits) {
            (Version::Second, _) => (0, 0),
            (Version::First, 3) => (0, 1),
            (Version::First, _) => (u32::MAX / ((1 << bits) - 1), 0),
        };
        let mut zeros = vec![0; groups * rows];
        for (group, zeros) in zeros.chunks_exact_mut(rows).enumerate() {
            let words = words.row(group).map(|word| word.wrapping_add(of_words));
            bitstream::unpack(words, bits, zeros);
            if of_fields > 0 {
                zeros.iter_mut().for_each(|zero| *zero = (*zero + of_fields) & 7);
            }
        }
        Ok(transpose(&zeros, groups, rows))
    }
}

/// The columns of a group where there are `groups` of them: as configured, if that makes so many,
/// or what divides the columns evenly.
pub(super) fn group_size(
    cols: usize,
    groups: usize,
    configured: Option<usize>,
) -> Result<usize, String> {
    let configured = configured.unwrap_or(cols);
    let even = if groups == 0 { 0 } else { cols.div_ceil(groups) };
    [configured, even]
        .into_iter()
        .find(|&size| size > 0 && cols.div_ceil(size) == groups)
        .ok_or_else(|| {
            format!("{groups} groups for {cols} columns; expected groups of {configured}")
        })
}

/// Whether a module can be written; a reason where not.
pub(super) fn accepts(spec: &ModuleSpec) -> Result<(), String> {
    let Codes::Integer { bits, .. } = spec.codes else {
        return Err("it holds integers with zero points only".to_owned());
    };
    if !BITS.contains(&bits) {
        return Err(format!("it holds codes of {BITS:?} bits, not of {bits}"));
    }
    for (what, len) in [("rows", spec.rows), ("columns", spec.cols)] {
        if !len.is_multiple_of(32) {
            return Err(format!(
                "it packs 32 codes along rows and columns; there are {len} {what}"
            ));
        }
    }
    Ok(())
}

/// The tensors of a module.
pub(super) fn encode(
    spec: &ModuleSpec,
    matrix: Option<&GroupedMatrix>,
    version: Version,
) -> Result<Vec<Tensor>, String> {
    let Codes::Integer { bits, .. } = spec.codes else {
        return Err("codes are no integers".to_owned());
    };
    let (rows, cols, groups) = (spec.rows, spec.cols, spec.groups());
    let column_words = bitstream::words(cols, bits).unwrap_or(0);
    let row_words = bitstream::words(rows, bits).unwrap_or(0);
    let mut tensors = vec![
        Tensor::new("qweight", DType::I32, [column_words, rows]),
        Tensor::new("qzeros", DType::I32, [groups, row_words]),
        Tensor::new("scales", DType::F16, [groups, rows]),
        Tensor::new("g_idx", DType::I32, [cols]),
    ];
    let Some(matrix) = matrix else { return Ok(tensors) };
    let Coding::Integer { zeros, .. } = &matrix.coding else {
        return Err("codes are no integers".to_owned());
    };

    let mut words = vec![0; column_words * rows];
    for (row, codes) in matrix.codes.chunks_exact(cols).enumerate() {
        let mut at = row;
        bitstream::pack(codes.iter().copied(), bits, |word| {
            words[at] = word;
            at += rows;
        });
    }
    tensors[0].data = integers(&words);

    let less = u8::from(version == Version::First);
    let mut words = Vec::with_capacity(groups * row_words);
    for group in 0..groups {
        let zeros: Option<Vec<u8>> =
            (0..rows).map(|row| zeros.at(bits, row * groups + group).checked_sub(less)).collect();
        let zeros = zeros.ok_or(
            "the first version stores zero points less one and has none of 0; write `gptq_v2`, or keep zero points from 1 on",
        )?;
        bitstream::pack(zeros, bits, |word| words.push(word));
    }
    tensors[1].data = integers(&words);
    tensors[2].data = floats(DType::F16, &transpose(&matrix.scales, rows, groups))?;
    let group_of: Vec<u32> = (0..cols).map(|col| matrix.group(col) as u32).collect();
    tensors[3].data = integers(&group_of);
    Ok(tensors)
}

/// The configuration: the most frequent kind of module, those that differ, and those left plain.
pub(super) fn config(
    main: &ModuleSpec,
    kinds: &[(&ModuleSpec, Vec<&str>)],
    plain: &[&str],
    v2: bool,
) -> Value {
    let any = |is: fn(&Codes) -> bool| kinds.iter().any(|(spec, _)| is(&spec.codes));
    let act_order = any(|codes| matches!(codes, Codes::Integer { act_order: true, .. }));
    let asymmetric = any(|codes| matches!(codes, Codes::Integer { symmetric: false, .. }));
    // A regular expression that is this name and no other.
    let only = |sign: char, name: &str| format!("{sign}:^{}$", name.replace('.', "\\."));
    let mut dynamic = Map::new();
    for name in plain.iter().filter(|name| **name != "lm_head") {
        dynamic.insert(only('-', name), json!({}));
    }
    for (spec, names) in kinds.iter().skip(1) {
        for name in names {
            let own = json!({
                "bits": spec.codes.bits(),
                "group_size": group_size_or_minus_one(spec),
            });
            dynamic.insert(only('+', name), own);
        }
    }
    let lm_head = kinds.iter().any(|(_, names)| names.contains(&"lm_head"));
    let format = if v2 { "gptq_v2" } else { "gptq" };
    let mut config = json!({
        "quant_method": "gptq",
        "bits": main.codes.bits(),
        "group_size": group_size_or_minus_one(main),
        "desc_act": act_order,
        "sym": !asymmetric,
        "lm_head": lm_head,
        "checkpoint_format": format,
        "pack_dtype": "int32",
        "true_sequential": true,
        "meta": {"quantizer": [concat!("bevel:", env!("CARGO_PKG_VERSION"))]},
    });
    if !dynamic.is_empty() {
        config["dynamic"] = Value::Object(dynamic);
    }
    config
}
