//! Weights of 8-bit floats (E4M3) with scales beside them: one for all, one a row, one a group of a
//! row or one a block. `fp8` checkpoints, DeepSeek's and Qwen3's among them, and those of
//! compressed-tensors differ in the name of the scales only.

use bevel_base::grouped::Coding;
use bevel_base::{DType, GroupedMatrix};

use super::module::Module;
use super::settings::Settings;
use crate::Result;

pub(super) const PARTS: &[&str] =
    &["weight", "weight_scale_inv", "weight_scale", "input_scale", "activation_scale"];

#[derive(Clone, Debug)]
pub(super) struct Fp8 {
    block: Option<[usize; 2]>,
}

impl Fp8 {
    pub(super) fn from_settings(
        settings: &Settings<'_>,
        warnings: &mut Vec<String>,
    ) -> Result<Self, String> {
        if let Some(scheme) = settings.text("activation_scheme")? {
            warnings.push(format!(
                "activations are meant to be rounded to 8-bit floats ({scheme}); only the weights are"
            ));
        }
        Ok(Self { block: settings.block("weight_block_size")? })
    }

    /// The scales' name where the module is stored in 8-bit floats.
    fn scales(module: &Module<'_>) -> Option<&'static str> {
        let quantized = module.dtype("weight") == Some(DType::F8_E4M3);
        ["weight_scale_inv", "weight_scale"].into_iter().find(|part| quantized && module.has(part))
    }

    pub(super) fn shape(&self, module: &Module<'_>) -> Result<Option<[usize; 2]>> {
        match Self::scales(module) {
            Some(_) => module.matrix("weight").map(Some),
            None => Ok(None),
        }
    }

    pub(super) fn read(&self, module: &Module<'_>) -> Result<GroupedMatrix> {
        let scales = Self::scales(module).unwrap_or("weight_scale");
        let codes = module.typed("weight", &[DType::F8_E4M3])?.data().to_vec();
        let scales = Scales::read(module, scales, self.block)?;
        Ok(scales.matrix(Coding::Float8, codes))
    }
}

/// The scales of a matrix whose codes take a byte each.
pub(super) struct Scales {
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) group_size: usize,
    /// `[rows, groups]`
    pub(super) scales: Vec<f32>,
}

impl Scales {
    /// Reads the scales of `module.weight`. `block` says how many rows and columns share one where
    /// it is neither one for all nor one for each row; without it, groups lie within rows.
    pub(super) fn read(module: &Module<'_>, part: &str, block: Option<[usize; 2]>) -> Result<Self> {
        let [rows, cols] = module.matrix("weight")?;
        let stored = module.floats(part)?;
        let layout = Layout::new([rows, cols], module.view(part)?.shape().dims(), block);
        let Some(Layout { block: [tall, wide], stride }) = layout else {
            let found = module.view(part)?.shape().clone();
            let expected = match block {
                Some([tall, wide]) => format!("one for each block of [{tall}, {wide}]"),
                None => "one, one a row, or the same number for each row".to_owned(),
            };
            let reason =
                format!("scales {found} for weights [{rows}, {cols}]; expected {expected}");
            return Err(module.error(part, reason));
        };
        let scales =
            (0..rows).flat_map(|row| stored[row / tall * stride..][..stride].iter().copied());
        Ok(Self { rows, cols, group_size: wide, scales: scales.collect() })
    }

    pub(super) fn matrix(self, coding: Coding, codes: Vec<u8>) -> GroupedMatrix {
        let Self { rows, cols, group_size, scales } = self;
        GroupedMatrix { rows, cols, group_size, coding, codes, scales, group_of: None }
    }
}

/// How scales cover a matrix.
struct Layout {
    /// Rows and columns that share a scale.
    block: [usize; 2],
    /// Scales in a row of blocks.
    stride: usize,
}

impl Layout {
    fn new(
        [rows, cols]: [usize; 2],
        scales: &[usize],
        block: Option<[usize; 2]>,
    ) -> Option<Layout> {
        let covers = |[tall, wide]: [usize; 2]| {
            scales == [rows.div_ceil(tall), cols.div_ceil(wide)].as_slice()
        };
        if let Some(block) = block.filter(|&block| covers(block)) {
            return Some(Layout { block, stride: cols.div_ceil(block[1]) });
        }
        match *scales {
            [] | [1] | [1, 1] => Some(Layout { block: [rows, cols], stride: 1 }),
            [n] | [n, 1] if n == rows => Some(Layout { block: [1, cols], stride: 1 }),
            [n, groups] if n == rows && groups > 0 && cols % groups == 0 => {
                Some(Layout { block: [1, cols / groups], stride: groups })
            }
            _ => None,
        }
    }
}
