//! Pictures out of what a model makes: f32 [N, H, W, C] in [−1, 1] to u8, side by side in a grid.

use std::io::Write;
use std::path::Path;

use image::ExtendedColorType;
use image::ImageEncoder;
use image::codecs::png::{CompressionType, FilterType, PngEncoder};

use super::{ReportError, write_atomically};
use crate::files::Durability;

/// Pixels between the images of a grid, and around them.
const PADDING: usize = 2;
/// Images are enlarged until their longer side has this many pixels, so that a person sees something.
const VISIBLE: usize = 64;

/// A batch of images, f32 [N, H, W, C] in [−1, 1].
#[derive(Clone, Copy, Debug)]
pub struct Images<'a> {
    pixels: &'a [f32],
    shape: [usize; 4],
}

impl<'a> Images<'a> {
    /// Pixels in the order [N, H, W, C]; C is 1 (grey) or 3 (RGB).
    ///
    /// # Errors
    /// The number of pixels is not N·H·W·C, the batch is empty, or C is neither 1 nor 3.
    pub fn new(pixels: &'a [f32], shape: [usize; 4]) -> Result<Images<'a>, ReportError> {
        let refuse = |expected: String| ReportError::Shape { shape, found: pixels.len(), expected };
        let size = shape.iter().try_fold(1_usize, |product, &n| product.checked_mul(n));
        match (size, shape[3]) {
            (Some(0), _) => Err(refuse("no dimension may be 0".to_owned())),
            (_, channels) if channels != 1 && channels != 3 => {
                Err(refuse("the last dimension must be 1 (grey) or 3 (RGB)".to_owned()))
            }
            (Some(size), _) if size == pixels.len() => Ok(Images { pixels, shape }),
            (Some(size), _) => Err(refuse(format!("there must be {size}"))),
            (None, _) => Err(refuse("that is more than there can be".to_owned())),
        }
    }

    /// [N, H, W, C].
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// All pixels, [N, H, W, C].
    pub fn pixels(&self) -> &'a [f32] {
        self.pixels
    }

    /// The pixels of each image, [H, W, C].
    pub fn each(&self) -> impl Iterator<Item = &'a [f32]> {
        self.pixels.chunks_exact(self.pixels.len() / self.shape[0])
    }
}

/// [−1, 1] to 0 … 255: rounded, not truncated; what lies outside is clamped, NaN becomes 0.
pub fn to_u8(x: f32) -> u8 {
    // `as` saturates and takes NaN to 0.
    ((x + 1.0) * 127.5).round() as u8
}

/// How a grid is laid out.
#[derive(Clone, Copy, Debug, Default)]
pub struct GridOptions {
    /// Images per row; by default as many as make the grid about square, ⌈√N⌉.
    pub columns: Option<usize>,
    /// Every pixel becomes upscale × upscale pixels; by default enough to make small images visible.
    pub upscale: Option<usize>,
}

/// A picture, u8 [H, W, C], grey (C = 1) or RGB (C = 3).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    width: usize,
    height: usize,
    channels: usize,
    pixels: Vec<u8>,
}

impl Picture {
    /// A picture of one image, without padding or enlargement.
    pub(super) fn of(image: &[f32], [height, width, channels]: [usize; 3]) -> Picture {
        Picture { width, height, channels, pixels: image.iter().map(|&x| to_u8(x)).collect() }
    }

    /// Width in pixels.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Height in pixels.
    pub fn height(&self) -> usize {
        self.height
    }

    /// 1 (grey) or 3 (RGB).
    pub fn channels(&self) -> usize {
        self.channels
    }

    /// The pixels, [H, W, C].
    pub fn pixels(&self) -> &[u8] {
        &self.pixels
    }

    /// The bytes of a PNG file.
    ///
    /// # Errors
    /// What the encoder says (a side longer than 2³¹ − 1 pixels).
    pub fn png(&self) -> Result<Vec<u8>, String> {
        let side = |n: usize| u32::try_from(n).map_err(|_| format!("{n} pixels are too many for a PNG"));
        let colour = if self.channels == 1 { ExtendedColorType::L8 } else { ExtendedColorType::Rgb8 };
        let mut bytes = Vec::new();
        PngEncoder::new_with_quality(&mut bytes, CompressionType::Default, FilterType::Adaptive)
            .write_image(&self.pixels, side(self.width)?, side(self.height)?, colour)
            .map_err(|error| error.to_string())?;
        Ok(bytes)
    }

    /// Writes a PNG file, atomically; missing folders are created.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write_png(&self, path: &Path) -> Result<(), ReportError> {
        let bytes = self.png().map_err(|message| ReportError::Encode { path: path.to_owned(), message })?;
        write_atomically(path, Durability::Kill, |file| file.write_all(&bytes).map_err(ReportError::io("write", path)))
    }
}

/// The images of a batch row by row, on black.
pub fn grid(images: &Images, options: &GridOptions) -> Picture {
    let [n, h, w, c] = images.shape();
    let scale = options.upscale.unwrap_or_else(|| VISIBLE.div_ceil(h.max(w))).max(1);
    let columns = options.columns.unwrap_or_else(|| ceil_sqrt(n)).clamp(1, n);
    let (cell_h, cell_w) = (h * scale + PADDING, w * scale + PADDING);
    let (height, width) = (n.div_ceil(columns) * cell_h + PADDING, columns * cell_w + PADDING);
    let mut pixels = vec![0; height * width * c];
    for (i, image) in images.each().enumerate() {
        let (top, left) = (PADDING + i / columns * cell_h, PADDING + i % columns * cell_w);
        for (y, row) in image.chunks_exact(w * c).enumerate() {
            let line: Vec<u8> = row
                .chunks_exact(c)
                .flat_map(|pixel| std::iter::repeat_n(pixel, scale).flatten().map(|&x| to_u8(x)))
                .collect();
            for copy in 0..scale {
                let start = ((top + y * scale + copy) * width + left) * c;
                pixels[start..start + line.len()].copy_from_slice(&line);
            }
        }
    }
    Picture { width, height, channels: c, pixels }
}

fn ceil_sqrt(n: usize) -> usize {
    let root = n.isqrt();
    if root * root == n { root } else { root + 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_u8_survives_the_way_there_and_back() {
        for value in 0..=255_u8 {
            assert_eq!(to_u8(f32::from(value) / 127.5 - 1.0), value);
        }
    }

    #[test]
    fn pixels_are_rounded_and_clamped() {
        // 0.6 / 127.5 above black rounds to 1 where truncation would give 0.
        let cases = [
            (-1.0 + 0.6 / 127.5, 1),
            (-1.0 + 0.4 / 127.5, 0),
            (0.0, 128),
            (1.0, 255),
            (1.5, 255),
            (-7.0, 0),
            (f32::INFINITY, 255),
            (f32::NEG_INFINITY, 0),
            (f32::NAN, 0),
        ];
        for (x, expected) in cases {
            assert_eq!(to_u8(x), expected, "{x}");
        }
    }

    #[test]
    fn a_grid_pixel_by_pixel() {
        // Three 1×2 grey images in two columns, enlarged twice.
        let pixels: Vec<f32> = [10, 20, 30, 40, 50, 60].iter().map(|&v| v as f32 / 127.5 - 1.0).collect();
        let images = Images::new(&pixels, [3, 1, 2, 1]).unwrap();
        let picture = grid(&images, &GridOptions { columns: None, upscale: Some(2) });
        assert_eq!((picture.width(), picture.height(), picture.channels()), (14, 10, 1));
        let rows: Vec<&[u8]> = picture.pixels().chunks(14).collect();
        let blank = [0; 14];
        let first = [0, 0, 10, 10, 20, 20, 0, 0, 30, 30, 40, 40, 0, 0];
        let second = [0, 0, 50, 50, 60, 60, 0, 0, 0, 0, 0, 0, 0, 0];
        let expected: [&[u8]; 10] = [&blank, &blank, &first, &first, &blank, &blank, &second, &second, &blank, &blank];
        assert_eq!(rows, expected);
    }

    #[test]
    fn layouts() {
        let size = |n: usize, h: usize, w: usize, columns, upscale| {
            let pixels = vec![0.0; n * h * w];
            let picture = grid(&Images::new(&pixels, [n, h, w, 1]).unwrap(), &GridOptions { columns, upscale });
            (picture.width(), picture.height())
        };
        assert_eq!(size(64, 28, 28, None, None), (8 * 86 + 2, 8 * 86 + 2)); // 28 → 84 pixels
        assert_eq!(size(5, 32, 32, None, None), (3 * 66 + 2, 2 * 66 + 2));
        assert_eq!(size(1, 256, 256, None, None), (260, 260));
        assert_eq!(size(6, 4, 8, Some(6), Some(1)), (6 * 10 + 2, 6 + 2));
        assert_eq!(size(2, 4, 4, Some(9), Some(1)), (2 * 6 + 2, 6 + 2)); // no empty columns
        assert_eq!(size(2, 4, 4, Some(0), Some(0)), (6 + 2, 2 * 6 + 2)); // at least one
    }

    #[test]
    fn png_files_read_back() {
        let folder = tempfile::tempdir().unwrap();
        for (channels, colour) in [(1, image::ColorType::L8), (3, image::ColorType::Rgb8)] {
            let pixels: Vec<f32> = (0..5 * 7 * 3 * channels).map(|i| (i as f32 * 0.7).cos()).collect();
            let picture = grid(&Images::new(&pixels, [5, 7, 3, channels]).unwrap(), &GridOptions::default());
            let path = folder.path().join(format!("new/folder/{channels}.png"));
            picture.write_png(&path).unwrap();
            let read = image::open(&path).unwrap();
            assert_eq!((read.width() as usize, read.height() as usize), (picture.width(), picture.height()));
            assert_eq!(read.color(), colour);
            assert_eq!(read.as_bytes(), picture.pixels());
        }
    }

    #[test]
    fn shapes_that_are_no_pictures() {
        let message = |shape, n| Images::new(&vec![0.0; n], shape).unwrap_err().to_string();
        assert_eq!(
            message([2, 3, 3, 1], 17),
            "cannot make pictures of shape [2, 3, 3, 1] out of 17 numbers: there must be 18"
        );
        assert_eq!(
            message([2, 3, 3, 2], 36),
            "cannot make pictures of shape [2, 3, 3, 2] out of 36 numbers: the last dimension must be 1 (grey) or 3 (RGB)"
        );
        assert!(message([0, 3, 3, 1], 0).ends_with("no dimension may be 0"));
        assert!(message([usize::MAX, 2, 2, 1], 4).ends_with("that is more than there can be"));
    }
}
