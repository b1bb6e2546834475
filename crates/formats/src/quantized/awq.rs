//! AWQ checkpoints in AutoAWQ's order for its `gemm` kernel. `docs/formats/awq.md` shows the layout.

use bevel_base::grouped::{Coding, Zeros};
use bevel_base::{DType, GroupedMatrix};
use serde_json::{Value, json};

use super::encode::{Tensor, floats, integers};
use super::format::{Codes, ModuleSpec, group_size_or_minus_one};
use super::gptq::group_size;
use super::module::{Module, Words, transpose};
use super::settings::{Settings, groups_in_words};
use crate::Result;

pub(super) const PARTS: &[&str] = &["qweight", "qzeros", "scales"];

/// The column of eight that nibble `i` of a word holds, lowest nibble first.
const ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

#[derive(Clone, Debug)]
pub(super) struct Awq {
    group_size: Option<usize>,
}

impl Awq {
    pub(super) fn from_settings(settings: &Settings<'_>) -> Result<Self, String> {
        let fields = ["version", "checkpoint_format", "format"];
        let field = fields.into_iter().find(|field| settings.has(field)).unwrap_or("version");
        match settings.text(field)?.map(str::to_lowercase).as_deref() {
            None | Some("gemm") => {}
            Some(other) => {
                let reason = format!(
                    "is `{other}`, which orders its words for one kernel; bevel reads `gemm`, into which AutoAWQ and GPTQModel save by default"
                );
                return Err(settings.wrong(field, &reason));
            }
        }
        settings.bits(if settings.has("w_bit") { "w_bit" } else { "bits" }, &[4])?;
        let field = if settings.has("q_group_size") { "q_group_size" } else { "group_size" };
        Ok(Self { group_size: settings.group_size(field)? })
    }

    pub(super) fn name(&self) -> String {
        format!("AWQ, 4 bits, {}", groups_in_words(self.group_size))
    }

    pub(super) fn shape(&self, module: &Module<'_>) -> Result<Option<[usize; 2]>> {
        if !module.has("qweight") {
            return Ok(None);
        }
        let [cols, words] = module.matrix("qweight")?;
        Ok(Some([words.saturating_mul(8), cols]))
    }

    pub(super) fn read(&self, module: &Module<'_>) -> Result<GroupedMatrix> {
        let words = module.words("qweight")?;
        let (rows, cols) = (words.cols.saturating_mul(8), words.rows);
        let [groups, _] = module.matrix("scales")?;
        module.expect("scales", &[groups, rows])?;
        let group_size = group_size(cols, groups, self.group_size)
            .map_err(|reason| module.error("scales", reason))?;
        let codes = unpack(&words);
        let zeros = match module.has("qzeros") {
            true => {
                module.expect("qzeros", &[groups, words.cols])?;
                Zeros::new(4, unpack(&module.words("qzeros")?))
            }
            false => Zeros::Symmetric,
        };
        let scales = transpose(&module.floats("scales")?, groups, rows);
        let coding = Coding::Integer { bits: 4, zeros };
        Ok(GroupedMatrix { rows, cols, group_size, coding, codes, scales, group_of: None })
    }
}

/// Words `[n, out / 8]` become codes `[out, n]`.
fn unpack(words: &Words<'_>) -> Vec<u8> {
    let mut codes = vec![0; words.rows * words.cols * 8];
    for col in 0..words.cols {
        for (nibble, place) in ORDER.into_iter().enumerate() {
            let codes = &mut codes[(8 * col + place) * words.rows..][..words.rows];
            for (row, code) in codes.iter_mut().enumerate() {
                *code = (words.at(row, col) >> (4 * nibble)) as u8 & 15;
            }
        }
    }
    codes
}

/// Whether a module can be written; a reason where not.
pub(super) fn accepts(spec: &ModuleSpec) -> Result<(), String> {
    match spec.codes {
        Codes::Integer { bits: 4, act_order: false, .. } => {}
        Codes::Integer { act_order: true, .. } => {
            return Err("it has no place for columns in another order".to_owned());
        }
        _ => return Err("it holds integers of 4 bits only".to_owned()),
    }
    if !spec.rows.is_multiple_of(8) {
        return Err(format!("it packs 8 rows together; there are {}", spec.rows));
    }
    spec.check_whole_groups()
}

/// The tensors of a module.
pub(super) fn encode(
    spec: &ModuleSpec,
    matrix: Option<&GroupedMatrix>,
) -> Result<Vec<Tensor>, String> {
    let (rows, cols, groups) = (spec.rows, spec.cols, spec.groups());
    let mut tensors = vec![
        Tensor::new("qweight", DType::I32, [cols, rows / 8]),
        Tensor::new("qzeros", DType::I32, [groups, rows / 8]),
        Tensor::new("scales", DType::F16, [groups, rows]),
    ];
    let Some(matrix) = matrix else { return Ok(tensors) };
    let Coding::Integer { bits, zeros } = &matrix.coding else {
        return Err("codes are no integers".to_owned());
    };
    tensors[0].data = pack(rows, cols, |row, col| matrix.codes[row * cols + col]);
    tensors[1].data = pack(rows, groups, |row, group| zeros.at(*bits, row * groups + group));
    tensors[2].data = floats(DType::F16, &transpose(&matrix.scales, rows, groups))?;
    Ok(tensors)
}

/// Codes `[out, n]` become words `[n, out / 8]`.
fn pack(rows: usize, n: usize, code: impl Fn(usize, usize) -> u8) -> Vec<u8> {
    let word = |at: usize, block: usize| {
        let nibbles = ORDER.into_iter().enumerate();
        nibbles.fold(0, |word, (nibble, place)| {
            word | u32::from(code(8 * block + place, at)) << (4 * nibble)
        })
    };
    let words: Vec<u32> = (0..n)
        .flat_map(|at| (0..rows / 8).map(move |block| (at, block)))
        .map(|(at, block)| word(at, block))
        .collect();
    integers(&words)
}

/// The configuration of modules that are all alike, but for those left plain.
pub(super) fn config(main: &ModuleSpec, plain: &[&str]) -> Value {
    json!({
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": group_size_or_minus_one(main),
        "zero_point": true,
        "modules_to_not_convert": if plain.is_empty() { Value::Null } else { json!(plain) },
    })
}
