//! Thrift's compact protocol, as far as Parquet's footer and page headers use it.

/// Structs in structs, and lists in lists.
const MAX_DEPTH: usize = 24;

pub(super) type Result<T> = std::result::Result<T, String>;

/// A field's wire type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wire {
    True,
    False,
    Byte,
    Integer,
    Double,
    Binary,
    List,
    Map,
    Struct,
}

/// Reads values off bytes.
#[derive(Debug)]
pub(super) struct Reader<'a> {
    bytes: &'a [u8],
    position: usize,
}

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, position: 0 }
    }

    /// Bytes read.
    pub(super) fn position(&self) -> usize {
        self.position
    }

    /// Calls `field` with the number and type of each field of a struct; it says whether it read
    /// the value, which is skipped otherwise.
    pub(super) fn fields(
        &mut self,
        field: &mut dyn FnMut(&mut Self, i64, Wire) -> Result<bool>,
    ) -> Result<()> {
        let mut id = 0i64;
        while let Some((delta, wire)) = self.field_header()? {
            id = match delta {
                0 => self.integer()?,
                delta => id + i64::from(delta),
            };
            if !field(self, id, wire)? {
                self.skip(wire, MAX_DEPTH)?;
            }
        }
        Ok(())
    }

    /// The number's distance from the last field's, and the type; `None` at a struct's end.
    fn field_header(&mut self) -> Result<Option<(u8, Wire)>> {
        match self.byte()? {
            0 => Ok(None),
            byte => Ok(Some((byte >> 4, wire(byte & 15)?))),
        }
    }

    pub(super) fn integer(&mut self) -> Result<i64> {
        let n = self.varint()?;
        Ok((n >> 1) as i64 ^ -((n & 1) as i64))
    }

    /// An integer that counts something.
    pub(super) fn count(&mut self) -> Result<u64> {
        let n = self.integer()?;
        n.try_into().map_err(|_| format!("a number should not be negative: {n}"))
    }

    pub(super) fn binary(&mut self) -> Result<&'a [u8]> {
        let len = usize::try_from(self.varint()?).unwrap_or(usize::MAX);
        let rest = &self.bytes[self.position..];
        let bytes = rest
            .get(..len)
            .ok_or_else(|| format!("a text should take {len} bytes, but {} follow", rest.len()))?;
        self.position += len;
        Ok(bytes)
    }

    pub(super) fn string(&mut self) -> Result<String> {
        let bytes = self.binary()?;
        Ok(str::from_utf8(bytes).map_err(|_| "a name is no UTF-8".to_owned())?.to_owned())
    }

    /// The length of a list, of which every element takes a byte at least, and its elements' type.
    pub(super) fn list(&mut self) -> Result<(usize, Wire)> {
        let byte = self.byte()?;
        let len = match byte >> 4 {
            15 => usize::try_from(self.varint()?).unwrap_or(usize::MAX),
            len => usize::from(len),
        };
        let rest = self.bytes.len() - self.position;
        if len > rest {
            return Err(format!("a list should have {len} elements, but {rest} bytes follow"));
        }
        Ok((len, wire(byte & 15)?))
    }

    fn skip(&mut self, wire: Wire, depth: usize) -> Result<()> {
        let depth = depth.checked_sub(1).ok_or("it is nested too deeply")?;
        match wire {
            Wire::True | Wire::False => {}
            Wire::Byte => drop(self.byte()?),
            Wire::Integer => drop(self.varint()?),
            Wire::Double => (0..8).try_for_each(|_| self.byte().map(drop))?,
            Wire::Binary => drop(self.binary()?),
            Wire::List => {
                let (len, wire) = self.list()?;
                for _ in 0..len {
                    self.skip_element(wire, depth)?;
                }
            }
            Wire::Map => {
                let len = self.varint()?;
                if len > 0 {
                    let kinds = self.byte()?;
                    for _ in 0..len {
                        self.skip_element(self::wire(kinds >> 4)?, depth)?;
                        self.skip_element(self::wire(kinds & 15)?, depth)?;
                    }
                }
            }
            Wire::Struct => {
                while let Some((delta, wire)) = self.field_header()? {
                    if delta == 0 {
                        self.integer()?;
                    }
                    self.skip(wire, depth)?;
                }
            }
        }
        Ok(())
    }

    /// In lists and maps a truth value takes a byte.
    fn skip_element(&mut self, wire: Wire, depth: usize) -> Result<()> {
        match wire {
            Wire::True | Wire::False => self.byte().map(drop),
            wire => self.skip(wire, depth),
        }
    }

    fn byte(&mut self) -> Result<u8> {
        let byte = self.bytes.get(self.position).ok_or("it ends too early")?;
        self.position += 1;
        Ok(*byte)
    }

    fn varint(&mut self) -> Result<u64> {
        varint(&mut || self.byte())
    }
}

/// Seven bits a byte, the lowest first; the eighth says that more follow.
pub(super) fn varint(byte: &mut dyn FnMut() -> Result<u8>) -> Result<u64> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let next = byte()?;
        value |= u64::from(next & 127) << shift;
        if next < 128 {
            return Ok(value);
        }
    }
    Err("a number takes more than 64 bits".to_owned())
}

fn wire(id: u8) -> Result<Wire> {
    Ok(match id {
        1 => Wire::True,
        2 => Wire::False,
        3 => Wire::Byte,
        4..=6 => Wire::Integer,
        7 => Wire::Double,
        8 => Wire::Binary,
        9 | 10 => Wire::List,
        11 => Wire::Map,
        12 => Wire::Struct,
        id => return Err(format!("a field has the unknown type {id}")),
    })
}
