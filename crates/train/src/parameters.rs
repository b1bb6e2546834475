use std::ops::Range;

/// What is trained: one list of values and one of gradients, and whose they are.
#[derive(Clone, Debug, Default)]
pub struct Parameters {
    /// All values, one parameter after the other.
    pub values: Vec<f32>,
    /// The gradient of each.
    pub gradients: Vec<f32>,
    all: Vec<Parameter>,
}

/// A trained matrix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameter {
    /// What it is called, for example `blk.3.attn_q.lora_a`.
    pub name: String,
    /// Rows and columns.
    pub shape: (usize, usize),
    /// Where its values are.
    pub range: Range<usize>,
    /// Whether weight decay makes it smaller; not where it is a norm or a bias.
    pub decays: bool,
}

impl Parameters {
    /// Adds a parameter, row-major, and returns its number.
    ///
    /// # Panics
    /// Where there are not as many values as its shape says.
    pub fn add(&mut self, name: String, shape: (usize, usize), values: &[f32]) -> usize {
        assert_eq!(values.len(), shape.0 * shape.1, "values of `{name}`");
        let range = self.values.len()..self.values.len() + values.len();
        self.values.extend_from_slice(values);
        self.gradients.resize(self.values.len(), 0.0);
        self.all.push(Parameter { name, shape, range, decays: true });
        self.all.len() - 1
    }

    /// Adds the values of a norm or a bias, as [`Parameters::add`] does; they do not decay.
    pub fn add_vector(&mut self, name: String, values: &[f32]) -> usize {
        let parameter = self.add(name, (1, values.len()), values);
        self.all[parameter].decays = false;
        parameter
    }

    /// All of them, in their order.
    pub fn all(&self) -> &[Parameter] {
        &self.all
    }

    /// The number of the one with this name.
    pub fn find(&self, name: &str) -> Option<usize> {
        self.all.iter().position(|parameter| parameter.name == name)
    }

    /// The values of one.
    pub fn get(&self, parameter: usize) -> &[f32] {
        &self.values[self.all[parameter].range.clone()]
    }

    /// The values of one, and its gradient to be added to.
    pub(crate) fn with_gradient(&mut self, parameter: usize) -> (&[f32], &mut [f32]) {
        let range = self.all[parameter].range.clone();
        (&self.values[range.clone()], &mut self.gradients[range])
    }

    /// ‖gradient‖ over all parameters.
    pub fn gradient_norm(&self) -> f64 {
        self.gradients.iter().map(|&g| f64::from(g) * f64::from(g)).sum::<f64>().sqrt()
    }

    /// Scales the gradients so that their norm is at most `most`, and returns what it was.
    pub fn clip_gradients(&mut self, most: f64) -> f64 {
        let norm = self.gradient_norm();
        if norm > most {
            let factor = (most / norm) as f32;
            self.gradients.iter_mut().for_each(|g| *g *= factor);
        }
        norm
    }

    /// Makes the gradients zero.
    pub fn clear_gradients(&mut self) {
        self.gradients.fill(0.0);
    }
}
