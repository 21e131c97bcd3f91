//! One PNG or JPEG picture to u8 pixels of the size and channels trained at.

use std::io::Cursor;
use std::panic::{AssertUnwindSafe, catch_unwind};

use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits};

use super::{Fault, ImageSize, jpeg, resize};

/// What every picture becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Target {
    pub size: ImageSize,
    /// 1 or 3.
    pub channels: usize,
}

impl Target {
    pub fn shape(&self) -> [usize; 3] {
        [self.size.height, self.size.width, self.channels]
    }
}

/// Most bytes that the pixels of one picture may take when they are decoded, before they are scaled. A header that claims more is refused,
/// not believed. (A decoder's own buffers come to it; they grow with a row, or for a progressive JPEG with the picture.)
const MAX_DECODED: u64 = 1 << 30;
const HELP: &str = "remove or replace the picture, or set data.on_bad_image = \"skip\"";

fn undecodable(found: impl ToString) -> Fault {
    Fault::Undecodable { expected: "a whole PNG or JPEG picture", found: found.to_string(), help: HELP }
}

/// Height and width as the picture is meant to be looked at, from its first bytes.
///
/// `bytes` may be cut after the header; what is wrong further on is not seen.
pub(super) fn probe(bytes: &[u8]) -> Result<ImageSize, Fault> {
    guard(|| {
        let mut decoder = decoder(bytes)?;
        let (width, height) = decoder.dimensions();
        let (height, width) =
            if swaps_sides(decoder.orientation().map_err(undecodable)?) { (width, height) } else { (height, width) };
        Ok(ImageSize { height: height as usize, width: width as usize })
    })
}

/// Decodes the picture `bytes` into `out`, `[H, W, C]`.
///
/// The orientation of a photograph (EXIF) is obeyed. Transparent pixels are laid over white. Sixteen bits are rounded to
/// eight, colours become grey with the weights of BT.709. The picture is scaled with a Lanczos filter to the smallest size
/// that covers the target (never enlarged) and cropped at the centre.
pub(super) fn decode(bytes: &[u8], target: Target, out: &mut [u8]) -> Result<(), Fault> {
    guard(|| {
        let mut decoder = decoder(bytes)?;
        let orientation = decoder.orientation().map_err(undecodable)?;
        let mut picture = DynamicImage::from_decoder(decoder).map_err(undecodable)?;
        if bytes.starts_with(jpeg::START) && !jpeg::is_whole(bytes) {
            return Err(undecodable("a JPEG that is cut short (no end-of-image marker)"));
        }
        picture.apply_orientation(orientation);
        let size = ImageSize { height: picture.height() as usize, width: picture.width() as usize };
        require(size, target.size)?;
        if picture.color().has_alpha() {
            picture = over_white(picture);
        }
        let pixels = match target.channels {
            1 => picture.into_luma8().into_raw(),
            _ => picture.into_rgb8().into_raw(),
        };
        resize::cover(&pixels, size, target.channels, target.size, out);
        Ok(())
    })
}

/// Refuses pictures that would have to be enlarged.
pub(super) fn require(found: ImageSize, need: ImageSize) -> Result<(), Fault> {
    if found.height < need.height || found.width < need.width { Err(Fault::TooSmall { need, found }) } else { Ok(()) }
}

/// A decoder must not take the process down whatever its input; a panic in one is a bad picture.
fn guard<T>(decode: impl FnOnce() -> Result<T, Fault>) -> Result<T, Fault> {
    catch_unwind(AssertUnwindSafe(decode)).unwrap_or_else(|_| Err(undecodable("the decoder panicked")))
}

fn decoder(bytes: &[u8]) -> Result<impl ImageDecoder + '_, Fault> {
    let mut reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format().map_err(undecodable)?;
    match reader.format() {
        Some(ImageFormat::Png | ImageFormat::Jpeg) => {}
        Some(format) => return Err(undecodable(format!("a {format:?} picture"))),
        None if bytes.is_empty() => return Err(undecodable("an empty file")),
        None => return Err(undecodable(format!("a file that starts with {:02x?}", &bytes[..bytes.len().min(4)]))),
    }
    let mut limits = Limits::default();
    limits.max_alloc = Some(MAX_DECODED);
    reader.limits(limits.clone());
    let mut decoder = reader.into_decoder().map_err(undecodable)?;
    // `DynamicImage::from_decoder` allocates what the header says without asking anyone.
    let bytes = decoder.total_bytes();
    if limits.reserve(bytes).is_err() {
        let (width, height) = decoder.dimensions();
        let claim = format!("a header that claims {height}×{width} pixels in {bytes} bytes, more than {MAX_DECODED}");
        return Err(undecodable(claim));
    }
    // What is left is for the decoder's own buffers.
    decoder.set_limits(limits).map_err(undecodable)?;
    Ok(decoder)
}

fn swaps_sides(orientation: Orientation) -> bool {
    use Orientation::{Rotate90, Rotate90FlipH, Rotate270, Rotate270FlipH};
    matches!(orientation, Rotate90 | Rotate270 | Rotate90FlipH | Rotate270FlipH)
}

fn over_white(picture: DynamicImage) -> DynamicImage {
    let mut rgba = picture.into_rgba8();
    for pixel in rgba.pixels_mut() {
        let alpha = u32::from(pixel.0[3]);
        for channel in &mut pixel.0[..3] {
            *channel = ((u32::from(*channel) * alpha + 255 * (255 - alpha) + 127) / 255) as u8;
        }
        pixel.0[3] = 255;
    }
    DynamicImage::ImageRgba8(rgba)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The start of a PNG of 8-bit RGB: signature, IHDR with a checksum that holds, and the length and name of an IDAT.
    fn header(width: u32, height: u32) -> Vec<u8> {
        let mut chunk = b"IHDR".to_vec();
        chunk.extend(width.to_be_bytes());
        chunk.extend(height.to_be_bytes());
        chunk.extend([8, 2, 0, 0, 0]);
        let mut crc = flate2::Crc::new();
        crc.update(&chunk);
        [b"\x89PNG\r\n\x1a\n\0\0\0\x0d", &chunk[..], &crc.sum().to_be_bytes(), b"\0\0\0\x20IDAT"].concat()
    }

    #[test]
    fn a_header_is_believed_up_to_the_limit_and_no_further() {
        // 16384·21845·3 = 2^30 − 16384 bytes.
        assert_eq!(probe(&header(16384, 21845)), Ok(ImageSize { height: 21845, width: 16384 }));
        for (width, height) in [(16384, 21846), (60_000, 60_000), (100_000, 100_000)] {
            let bytes = header(width, height);
            let target = Target { size: ImageSize::square(8), channels: 3 };
            for fault in [probe(&bytes).unwrap_err(), decode(&bytes, target, &mut [0; 192]).unwrap_err()] {
                let text = fault.to_string();
                assert!(text.contains(&format!("claims {height}×{width} pixels")), "{text}");
                assert!(text.contains("more than 1073741824"), "{text}");
            }
        }
        // One row of the largest PNG there is: the decoder itself refuses it.
        assert!(probe(&header(i32::MAX as u32, 1)).is_err());
    }
}
