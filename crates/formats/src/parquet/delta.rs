//! DELTA_BINARY_PACKED: numbers as differences, in blocks of bits. Lengths of strings are stored so.

use super::levels::packed;
use super::thrift::{Result, varint};

/// Numbers that a byte may stand for; writers reach 26.
const MOST_PER_BYTE: usize = 64;

/// Reads all numbers that begin at `position`, which moves past them. None may be negative.
pub(super) fn lengths(bytes: &[u8], position: &mut usize) -> Result<Vec<usize>> {
    let block = number(bytes, position)? as usize;
    let miniblocks = number(bytes, position)? as usize;
    let count = number(bytes, position)? as usize;
    let first = zigzag(number(bytes, position)?);
    let size = block.checked_div(miniblocks).unwrap_or(0);
    if block > 1 << 16 || size == 0 || !size.is_multiple_of(8) {
        return Err(format!("blocks of {block} numbers in {miniblocks} parts"));
    }
    if count > bytes.len().saturating_mul(MOST_PER_BYTE) {
        return Err(format!("{count} numbers in a page of {} bytes", bytes.len()));
    }
    let mut found = Vec::with_capacity(count);
    let mut last = first;
    let mut push = |value: i64| {
        found.push(usize::try_from(value).map_err(|_| format!("a length is {value}"))?);
        Ok::<_, String>(())
    };
    if count > 0 {
        push(first)?;
    }
    let mut left = count.saturating_sub(1);
    while left > 0 {
        let least = zigzag(number(bytes, position)?);
        let widths = bytes.get(*position..*position + miniblocks);
        let widths = widths.ok_or("a page ends within its lengths")?;
        *position += miniblocks;
        for &width in widths {
            if left == 0 {
                break;
            }
            if width > 64 {
                return Err(format!("numbers of {width} bits; expected at most 64"));
            }
            for i in 0..size.min(left) {
                let bit = i * usize::from(width);
                let delta = packed(bytes, *position, bit, width.into())? as i64;
                last = last.wrapping_add(least).wrapping_add(delta);
                push(last)?;
            }
            left -= size.min(left);
            *position += size / 8 * usize::from(width);
        }
    }
    // The last part is stored whole, though none of its numbers beyond the count means anything.
    *position = (*position).min(bytes.len());
    Ok(found)
}

fn number(bytes: &[u8], position: &mut usize) -> Result<u64> {
    varint(&mut || {
        let byte = bytes.get(*position).ok_or("a page ends within its lengths")?;
        *position += 1;
        Ok(*byte)
    })
}

fn zigzag(n: u64) -> i64 {
    (n >> 1) as i64 ^ -((n & 1) as i64)
}
