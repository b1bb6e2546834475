//! Scales of input channels, folded into the operation before (AWQ, arXiv 2306.00978): a channel's
//! weights are multiplied by `s`, its values divided by it, and nothing changes but what rounding does.

use bevel_model::{Block, Stage};

use super::{Layer, Linear};
use crate::{Error, Result};

impl Layer<'_, '_> {
    /// True where the operation before a stage can take up the division: a norm's gain, the values
    /// that attention mixes, the up projection.
    pub(crate) fn can_fold(&self, stage: Stage) -> bool {
        let config = self.walk.checkpoint.config();
        let has = |name: &str| self.walk.checkpoint.tensors().contains_key(&self.full_name(name));
        match stage {
            Stage::Qkv => has("attn_norm.weight"),
            Stage::AttentionOutput => true,
            Stage::GateUp => has("ffn_norm.weight") && config.experts.is_none(),
            Stage::Down => config.experts.is_none(),
        }
    }

    /// The number of what produces each input channel of a stage, where several share one: heads of
    /// attention that share values.
    pub(crate) fn ties(&self, stage: Stage) -> Option<Vec<usize>> {
        let config = self.walk.checkpoint.config();
        if stage != Stage::AttentionOutput || config.heads == config.kv_heads {
            return None;
        }
        let (size, sharing) = (config.head_dim, config.heads / config.kv_heads);
        let inputs = 0..config.heads * size;
        Some(inputs.map(|j| j / size / sharing * size + j % size).collect())
    }

    /// Multiplies the input channels of a stage by `scales`, `[in]`, and divides what produces them.
    ///
    /// # Panics
    /// Where it [cannot](Layer::can_fold), or a length differs.
    pub(crate) fn fold(&mut self, stage: Stage, scales: &[f32]) -> Result<()> {
        assert!(self.can_fold(stage), "{stage:?} of this layer");
        for linear in self.linears(stage, None) {
            let mut weight = self.weight(&linear)?;
            for row in weight.chunks_exact_mut(scales.len()) {
                row.iter_mut().zip(scales).for_each(|(w, s)| *w *= s);
            }
            self.change(&linear, weight)?;
        }
        match stage {
            Stage::Qkv => self.divide_vector("attn_norm.weight", 0, scales),
            Stage::GateUp => self.divide_vector("ffn_norm.weight", 0, scales),
            Stage::AttentionOutput => {
                let values = match self.ties(stage) {
                    Some(ties) => {
                        let mut values = vec![1.0; ties.iter().max().map_or(0, |last| last + 1)];
                        ties.iter().zip(scales).for_each(|(&tie, s)| values[tie] = *s);
                        values
                    }
                    None => scales.to_vec(),
                };
                self.divide_rows(&["attn_v", "attn_qkv"], &values)
            }
            Stage::Down => self.divide_rows(&["ffn_up"], scales),
        }
    }

    /// Divides the last rows of the first of `stems` that the layer has, and of its bias.
    fn divide_rows(&mut self, stems: &[&str], scales: &[f32]) -> Result<()> {
        let linears = [Stage::Qkv, Stage::GateUp].map(|stage| self.linears(stage, None)).concat();
        let linear = stems.iter().find_map(|stem| {
            let name = self.full_name(&format!("{stem}.weight"));
            linears.iter().find(|linear| linear.name == name).cloned()
        });
        let linear = linear.expect("every layer has one");
        let mut weight = self.weight(&linear)?;
        let first = linear.rows - scales.len();
        for (row, s) in weight.chunks_exact_mut(linear.cols).skip(first).zip(scales) {
            row.iter_mut().for_each(|w| *w /= s);
        }
        self.change(&linear, weight)?;
        let bias = linear.name.replace(".weight", ".bias");
        if self.walk.checkpoint.tensors().contains_key(&bias) {
            let name = bias[self.full_name("").len()..].to_owned();
            self.divide_vector(&name, first, scales)?;
        }
        Ok(())
    }

    /// Divides values `first ..` of a norm or bias.
    fn divide_vector(&mut self, name: &str, first: usize, scales: &[f32]) -> Result<()> {
        let full = self.full_name(name);
        let mut values = match self.changed.get(&(full.clone(), None)) {
            Some(values) => values.clone(),
            None => self.walk.checkpoint.read_f32(&full)?,
        };
        values[first..].iter_mut().zip(scales).for_each(|(v, s)| *v /= s);
        for block in std::iter::once(&mut self.block).chain(&mut self.full) {
            block.set_vector(name, &values)?;
        }
        self.changed.insert((full, None), values);
        Ok(())
    }

    /// The layer's weights, the uncompressed model's too, are others from now on.
    fn change(&mut self, linear: &Linear, weight: Vec<f32>) -> Result<()> {
        let name = linear.name[self.full_name("").len()..].to_owned();
        let set = |block: &mut Block| {
            block.set_weight(self.walk.cpu, &name, linear.part, &weight).map_err(Error::from)
        };
        std::iter::once(&mut self.block).chain(&mut self.full).try_for_each(set)?;
        self.changed.insert((linear.name.clone(), linear.part), weight);
        Ok(())
    }

    /// What folding changed: each tensor's part as a matrix, and its values.
    pub(crate) fn changed(&self) -> impl Iterator<Item = (Linear, &[f32])> {
        self.changed.iter().map(|((name, part), values)| {
            let cols = self.walk.checkpoint.tensors()[name].shape.row_len();
            let linear =
                Linear { name: name.clone(), part: *part, rows: values.len() / cols, cols };
            (linear, &values[..])
        })
    }
}
