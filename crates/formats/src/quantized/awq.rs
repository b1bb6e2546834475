//! AWQ checkpoints as AutoAWQ writes them for its `gemm` kernel. `docs/formats/awq.md` shows the
//! layout.

use bevel_base::GroupedMatrix;
use bevel_base::grouped::{Coding, Zeros};

use super::gptq::group_size;
use super::module::{Module, Words, transpose};
use super::settings::{Settings, groups_in_words};
use crate::Result;

pub(super) const PARTS: &[&str] = &["qweight", "qzeros", "scales"];

/// The column of eight that nibble `i` of a word holds, lowest nibble first.
pub(super) const ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

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
