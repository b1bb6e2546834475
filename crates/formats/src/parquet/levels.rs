//! The hybrid of run lengths and packed bits that levels and dictionary indices are stored in.

use super::thrift::{Result, varint};

/// Reads numbers of `width` bits off a part of a page, one by one.
#[derive(Debug, Default)]
pub(super) struct Hybrid {
    position: usize,
    end: usize,
    width: u32,
    /// What is left of the current run.
    left: u64,
    /// The value of a run; `None` where bits are packed.
    value: Option<u32>,
    /// Bits read of a packed run.
    bit: usize,
}

impl Hybrid {
    /// For `bytes[start..end]`.
    pub(super) fn new(start: usize, end: usize, width: u32) -> Result<Self> {
        if width > 32 {
            return Err(format!("numbers of {width} bits; expected at most 32"));
        }
        Ok(Self { position: start, end, width, ..Self::default() })
    }

    pub(super) fn next(&mut self, bytes: &[u8]) -> Result<u32> {
        if self.width == 0 {
            return Ok(0);
        }
        let bytes = &bytes[..self.end];
        while self.left == 0 {
            self.run(bytes)?;
        }
        self.left -= 1;
        if let Some(value) = self.value {
            return Ok(value);
        }
        let value = packed(bytes, self.position, self.bit, self.width)?;
        self.bit += self.width as usize;
        if self.left == 0 {
            // Runs of packed bits end at a byte: their values come in eights.
            self.position += self.bit / 8;
        }
        Ok(value as u32)
    }

    fn run(&mut self, bytes: &[u8]) -> Result<()> {
        let position = &mut self.position;
        let header = varint(&mut || {
            let byte = bytes.get(*position).ok_or("a page ends within its levels")?;
            *position += 1;
            Ok(*byte)
        })?;
        self.left = header >> 1;
        self.value = None;
        self.bit = 0;
        if header & 1 == 1 {
            self.left = self.left.checked_mul(8).ok_or("a run is too long")?;
            return Ok(());
        }
        let len = self.width.div_ceil(8) as usize;
        let stored = bytes.get(self.position..self.position + len);
        let stored = stored.ok_or("a page ends within its levels")?;
        self.position += len;
        self.value = Some(stored.iter().rev().fold(0, |value, &byte| value << 8 | u32::from(byte)));
        Ok(())
    }
}

/// The number of `width` ≤ 64 bits that lies `bit` bits after byte `start`, the lowest bit first.
pub(super) fn packed(bytes: &[u8], start: usize, bit: usize, width: u32) -> Result<u64> {
    let first = start.saturating_add(bit / 8);
    let shift = bit % 8;
    let len = (shift + width as usize).div_ceil(8);
    let stored = bytes.get(first..first.saturating_add(len)).ok_or("a page ends too early")?;
    let all = stored.iter().rev().fold(0u128, |value, &byte| value << 8 | u128::from(byte));
    let mask = if width == 64 { u64::MAX } else { (1 << width) - 1 };
    Ok((all >> shift) as u64 & mask)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(bytes: &[u8], width: u32, expected: &[u32]) {
        let mut hybrid = Hybrid::new(0, bytes.len(), width).unwrap();
        let found: Result<Vec<u32>> = expected.iter().map(|_| hybrid.next(bytes)).collect();
        assert_eq!(found.unwrap(), expected);
    }

    #[test]
    fn runs_and_packed_bits() {
        // The format's own example: 0 to 7 in three bits each.
        check(&[3, 0b1000_1000, 0b1100_0110, 0b1111_1010], 3, &[0, 1, 2, 3, 4, 5, 6, 7]);
        // Five times 4, then eight bits.
        check(&[10, 4, 3, 0b1010_0101], 1, &[4, 4, 4, 4, 4, 1, 0, 1, 0, 0, 1, 0, 1]);
        check(&[4, 0x34, 0x12], 16, &[0x1234, 0x1234]);
        check(&[], 0, &[0, 0, 0]);
        assert!(Hybrid::new(0, 1, 3).unwrap().next(&[3]).is_err());
        assert!(Hybrid::new(0, 0, 3).unwrap().next(&[]).is_err());
        assert!(Hybrid::new(0, 0, 33).is_err());
    }
}
