use std::io::{self, Read};

use sha1::Sha1;
use sha2::{Digest, Sha256};

use super::repo::is_hex;

/// What an etag says about a file's bytes: the hub's are the sha256 of a large file (64 digits) or
/// git's blob hash of a small one (40 digits: the sha1 of `blob <length>\0` and the bytes). Other
/// etags say nothing.
pub(super) enum Checksum {
    Sha256(Box<Sha256>),
    GitBlob(Box<Sha1>),
    Unknown,
}

impl Checksum {
    pub(super) fn for_etag(etag: &str, size: u64) -> Self {
        if is_hex(etag, 64) {
            Self::Sha256(Box::default())
        } else if is_hex(etag, 40) {
            Self::GitBlob(Box::new(Sha1::new_with_prefix(format!("blob {size}\0"))))
        } else {
            Self::Unknown
        }
    }

    pub(super) fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hash) => hash.update(bytes),
            Self::GitBlob(hash) => hash.update(bytes),
            Self::Unknown => {}
        }
    }

    /// Reads to the end; returns the number of bytes.
    pub(super) fn update_from(&mut self, mut reader: impl Read) -> io::Result<u64> {
        let mut buffer = vec![0; 1 << 20];
        let mut total = 0;
        loop {
            match reader.read(&mut buffer) {
                Ok(0) => return Ok(total),
                Ok(n) => {
                    self.update(&buffer[..n]);
                    total += n as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// The name of the hash and its digits; `None` where nothing is known.
    pub(super) fn finish(self) -> Option<(&'static str, String)> {
        match self {
            Self::Sha256(hash) => Some(("sha256", hex(&hash.finalize()))),
            Self::GitBlob(hash) => Some(("git blob hash", hex(&hash.finalize()))),
            Self::Unknown => None,
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(etag: &str, bytes: &[u8]) {
        let mut sum = Checksum::for_etag(etag, bytes.len() as u64);
        sum.update(&bytes[..2]);
        assert_eq!(sum.update_from(&bytes[2..]).unwrap(), bytes.len() as u64 - 2);
        assert_eq!(sum.finish().unwrap().1, etag);
    }

    #[test]
    fn published_digests() {
        // `printf 'hello\n' | git hash-object --stdin`, and the sha256 of `abc` in FIPS 180-4.
        check("ce013625030ba8dba906f756967f9e9ca394464a", b"hello\n");
        check("ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad", b"abc");
    }
}
