use bevel_base::Pool;

use crate::Isa;

/// The processor kernels run on: its threads and the instruction set chosen for them.
#[derive(Debug)]
pub struct Cpu {
    pool: Pool,
    isa: Isa,
}

impl Cpu {
    /// `threads` threads (0: one for each processor) with the instruction set of [`Isa::detect`].
    ///
    /// # Errors
    /// Those of [`Isa::detect`].
    pub fn new(threads: usize) -> Result<Self, String> {
        Ok(Self::with_isa(threads, Isa::detect()?))
    }

    /// As [`Cpu::new`], with a given instruction set.
    ///
    /// # Panics
    /// Where this processor lacks `isa`.
    pub fn with_isa(threads: usize, isa: Isa) -> Self {
        assert!(Isa::available().contains(&isa), "this processor lacks {isa}");
        Self { pool: Pool::new(threads), isa }
    }

    /// The threads.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// The instruction set.
    pub fn isa(&self) -> Isa {
        self.isa
    }
}
