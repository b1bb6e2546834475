//! Files of zstd. One that was appended to, or packed in parallel, has several frames.

use std::io::{self, BufRead, Read};

use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};

/// The contents of all frames, one after another, but for those that are to be skipped.
pub(super) struct Frames<R: BufRead> {
    source: R,
    /// The frame that is being read, once it has begun.
    frame: FrameDecoder,
    ended: bool,
}

impl<R: BufRead> Frames<R> {
    /// Begins with the first frame.
    ///
    /// # Errors
    /// Where that is none.
    pub(super) fn open(source: R) -> io::Result<Self> {
        let mut frames = Self { source, frame: FrameDecoder::new(), ended: false };
        frames.begin()?;
        Ok(frames)
    }

    /// Goes to the frame that comes next, if one does.
    fn begin(&mut self) -> io::Result<()> {
        while !self.source.fill_buf()?.is_empty() {
            let skipped = match self.frame.init(&mut self.source) {
                Ok(()) => return Ok(()),
                Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame {
                    length,
                    ..
                })) => u64::from(length),
                Err(error) => return Err(io::Error::other(format!("it is no zstd: {error}"))),
            };
            io::copy(&mut self.source.by_ref().take(skipped), &mut io::sink())?;
        }
        self.ended = true;
        Ok(())
    }
}

impl<R: BufRead> Read for Frames<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while !self.ended && !buf.is_empty() {
            if self.frame.can_collect() > 0 {
                return self.frame.read(buf);
            }
            if self.frame.is_finished() {
                self.begin()?;
            } else {
                let one = BlockDecodingStrategy::UptoBlocks(1);
                self.frame.decode_blocks(&mut self.source, one).map_err(io::Error::other)?;
            }
        }
        Ok(0)
    }
}
