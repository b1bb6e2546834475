//! What a step needs beside weights and tokens: how it computes, and buffers.

use std::ops::Range;

use bevel_kernels::linalg::{Panels, Precision, Term, Update, View, gemm_in, multiply};
use bevel_kernels::{AttentionScratch, Cpu, KvPool, RopeTable, scale};
use bevel_model::ModelConfig;

/// What a step runs over, the same for all layers.
#[derive(Clone, Copy)]
pub(crate) struct Step<'a> {
    pub(crate) cpu: &'a Cpu,
    pub(crate) precision: Precision,
    pub(crate) config: &'a ModelConfig,
    /// Rows of each sequence.
    pub(crate) sequences: &'a [Range<usize>],
    pub(crate) rope: &'a RopeTable,
    pub(crate) local_rope: Option<&'a RopeTable>,
    pub(crate) n: usize,
    /// Start of the random numbers of dropout and noise; `None` where there is to be none.
    pub(crate) noise: Option<u64>,
}

impl Step<'_> {
    /// `C = A · B`, or `C += A · B`.
    pub(crate) fn product(&self, update: Update, a: View<'_>, b: View<'_>, c: &mut [f32]) {
        gemm_in(self.cpu, self.precision, update, a, b, c, b.cols());
    }

    /// Values `[n, width]`, packed as the left factor of products.
    pub(crate) fn packed(&self, values: &[f32], n: usize, room: &mut Room) -> Panels {
        let mut panels = room.panels.pop().unwrap_or_default();
        let width = values.len() / n.max(1);
        panels.pack_left(self.cpu, self.precision, View::new(values, n, width));
        panels
    }

    /// A matrix, packed as the right factor of products.
    pub(crate) fn packed_right(&self, matrix: View<'_>, room: &mut Room) -> Panels {
        let mut panels = room.panels.pop().unwrap_or_default();
        panels.pack_right(self.cpu, self.precision, matrix);
        panels
    }

    /// `factor · A · B` as a matrix of its own; A is packed, `[n, k]`.
    pub(crate) fn scaled_product(
        &self,
        factor: f32,
        a: &Panels,
        b: View<'_>,
        room: &mut Room,
    ) -> Vec<f32> {
        let width = b.cols();
        let b = self.packed_right(b, room);
        let mut product = room.take(self.n * width);
        multiply(self.cpu, Update::Set, &[Term::new(a, &b)], &mut product, width);
        scale(self.cpu, &mut product, factor);
        room.give_panels(b);
        product
    }
}

/// The input of linear layers, `[n, in]`.
#[derive(Clone, Copy)]
pub(crate) struct Input<'a> {
    pub(crate) values: &'a [f32],
    /// The same, packed as the left factor of products.
    pub(crate) packed: &'a Panels,
}

/// Buffers that steps share.
#[derive(Debug, Default)]
pub(crate) struct Room {
    /// Unpacked weights.
    pub(crate) tile: Vec<f32>,
    /// Packed weights.
    pub(crate) right: Panels,
    /// Panels that lie idle.
    panels: Vec<Panels>,
    pub(crate) kv: Option<KvPool>,
    pub(crate) attention: AttentionScratch,
    pub(crate) attention_backward: Vec<f32>,
    /// Buffers that lie idle, and the step that gave them back.
    spare: Vec<(u64, Vec<f32>)>,
    /// Steps so far.
    steps: u64,
}

/// Values that a buffer of so many has room for: quarters of octaves, so that the next step's buffers fit this one's.
pub(crate) fn capacity(len: usize) -> usize {
    len.next_multiple_of((len / 4).next_power_of_two().max(16))
}

/// Steps after which an idle buffer is freed.
const IDLE: u64 = 2;

impl Room {
    /// Begins a step, which may be of another length than those before: frees what was of no use for some steps.
    pub(crate) fn begin(&mut self) {
        self.steps += 1;
        self.spare.retain(|(given, _)| given + IDLE >= self.steps);
    }

    /// A buffer of so many values, whatever they are: fresh memory would have to be zeroed, and touched first.
    pub(crate) fn take(&mut self, len: usize) -> Vec<f32> {
        let capacity = capacity(len);
        let spare = self.spare.iter().position(|(_, buffer)| buffer.capacity() == capacity);
        let mut buffer = match spare {
            Some(i) => self.spare.swap_remove(i).1,
            None => Vec::with_capacity(capacity),
        };
        buffer.resize(len, 0.0);
        buffer
    }

    /// The same, all zero.
    pub(crate) fn zeros(&mut self, len: usize) -> Vec<f32> {
        let mut buffer = self.take(len);
        buffer.fill(0.0);
        buffer
    }

    /// A copy of values.
    pub(crate) fn copy(&mut self, values: &[f32]) -> Vec<f32> {
        let mut buffer = self.take(values.len());
        buffer.copy_from_slice(values);
        buffer
    }

    /// Takes buffers back.
    pub(crate) fn give(&mut self, buffers: impl IntoIterator<Item = Vec<f32>>) {
        let buffers = buffers.into_iter().filter(|buffer| buffer.capacity() > 0);
        self.spare.extend(buffers.map(|buffer| (self.steps, buffer)));
    }

    /// Takes panels back.
    pub(crate) fn give_panels(&mut self, panels: Panels) {
        self.panels.push(panels);
    }
}
