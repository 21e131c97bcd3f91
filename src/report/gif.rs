//! Animations: the denoising, as a grid that moves.

use std::path::Path;
use std::time::Duration;

use image::codecs::gif::{GifEncoder, Repeat};
use image::{Delay, Frame, RgbaImage};

use super::{Picture, ReportError, write_atomically};
use crate::files::Durability;

/// The whole animation, without the rest on its last frame, takes about this long.
const MOTION: Duration = Duration::from_secs(4);
/// Browsers slow down frames that are shorter than 20 ms; longer than a fifth of a second nothing seems to move.
const FRAME: (Duration, Duration) = (Duration::from_millis(40), Duration::from_millis(200));
/// How long the last frame, the finished image, stays.
const LAST: Duration = Duration::from_millis(2500);
/// NeuQuant's sampling of the pixels (1 all, 30 one in thirty) where more than 256 colours must be reduced. On grids of
/// colour noise turning into gradients, 10 is within 0.8 dB of 1 and ten times as fast.
const SAMPLING: i32 = 10;

/// Writes an animation that repeats for ever, resting on its last frame; atomically, missing folders are created.
///
/// Each frame has a palette of its own. It is exact for grey pictures; colours beyond 256 are reduced to the 256 that
/// fit them best.
///
/// # Errors
/// No frame, frames of unlike sizes or longer than 65,535 pixels, or the file cannot be written.
pub fn write_gif(path: &Path, frames: &[Picture]) -> Result<(), ReportError> {
    let encode = |message: String| ReportError::Encode { path: path.to_owned(), message };
    let Some(first) = frames.first() else { return Err(encode("there are no frames".to_owned())) };
    let (width, height) = (first.width(), first.height());
    let (Ok(short_width), Ok(short_height)) = (u16::try_from(width), u16::try_from(height)) else {
        let limit = "a GIF has at most 65535 pixels each way; take fewer or smaller images";
        return Err(ReportError::TooLarge { path: path.to_owned(), width, height, limit });
    };
    if frames.iter().any(|frame| (frame.width(), frame.height()) != (width, height)) {
        return Err(encode("the frames differ in size".to_owned()));
    }
    write_atomically(path, Durability::Kill, |file| {
        let mut encoder = GifEncoder::new_with_speed(file, SAMPLING);
        encoder.set_repeat(Repeat::Infinite).map_err(|error| encode(error.to_string()))?;
        for (i, picture) in frames.iter().enumerate() {
            let delay = if i + 1 == frames.len() { LAST } else { frame_delay(frames.len()) };
            let pixels = rgba(picture);
            let image = RgbaImage::from_raw(short_width.into(), short_height.into(), pixels)
                .ok_or_else(|| encode("a frame lacks pixels".to_owned()))?;
            let frame = Frame::from_parts(image, 0, 0, Delay::from_saturating_duration(delay));
            encoder.encode_frame(frame).map_err(|error| match error {
                image::ImageError::IoError(source) => ReportError::io("write", path)(source),
                other => encode(other.to_string()),
            })?;
        }
        Ok(())
    })
}

/// In whole hundredths of a second, which is what a GIF can say.
fn frame_delay(frames: usize) -> Duration {
    let even = MOTION.as_millis() as u64 / frames as u64;
    Duration::from_millis(even / 10 * 10).clamp(FRAME.0, FRAME.1)
}

fn rgba(picture: &Picture) -> Vec<u8> {
    let pixel = |pixel: &[u8]| match *pixel {
        [r, g, b] => [r, g, b, 255],
        _ => [pixel[0], pixel[0], pixel[0], 255],
    };
    picture.pixels().chunks_exact(picture.channels()).flat_map(pixel).collect()
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::BufReader;

    use image::AnimationDecoder;
    use image::codecs::gif::GifDecoder;

    use super::super::{GridOptions, Images, grid};
    use super::*;

    fn read(path: &Path) -> Vec<Frame> {
        let decoder = GifDecoder::new(BufReader::new(File::open(path).unwrap())).unwrap();
        decoder.into_frames().collect_frames().unwrap()
    }

    fn frames(count: usize, channels: usize) -> Vec<Picture> {
        let side = 24;
        let options = GridOptions { columns: Some(2), upscale: Some(1) };
        let frame = |t: usize| {
            let wave = |i: usize| ((i / channels) as f32 * 0.01 + (i % channels) as f32 * 2.0 + t as f32).sin();
            let pixels: Vec<f32> = (0..4 * side * side * channels).map(wave).collect();
            grid(&Images::new(&pixels, [4, side, side, channels]).unwrap(), &options)
        };
        (0..count).map(frame).collect()
    }

    #[test]
    fn grey_frames_are_exact_and_the_last_one_rests() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new/denoising.gif");
        let pictures = frames(50, 1);
        write_gif(&path, &pictures).unwrap();
        let read = read(&path);
        assert_eq!(read.len(), 50);
        for (i, (frame, picture)) in read.iter().zip(&pictures).enumerate() {
            assert_eq!(frame.buffer().as_raw(), &rgba(picture), "frame {i}");
            let delay = Duration::from(frame.delay());
            assert_eq!(delay, if i == 49 { Duration::from_millis(2500) } else { Duration::from_millis(80) });
        }
    }

    #[test]
    fn colours_are_close() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("colour.gif");
        let pictures = frames(3, 3);
        write_gif(&path, &pictures).unwrap();
        let read = read(&path);
        assert_eq!(read.len(), 3);
        for (frame, picture) in read.iter().zip(&pictures) {
            let off = |(a, b): (&u8, &u8)| f64::from(a.abs_diff(*b)).powi(2);
            let expected = rgba(picture);
            let error = frame.buffer().as_raw().iter().zip(&expected).map(off).sum::<f64>() / expected.len() as f64;
            let psnr = 10.0 * (255.0_f64.powi(2) / error).log10();
            // The 6×6×6 cube that a fixed palette would use is off by up to 25 levels: 25 dB.
            assert!(psnr > 35.0, "{psnr:.1} dB");
        }
    }

    #[test]
    fn delays_fit_the_number_of_frames() {
        let cases = [(2, 200), (20, 200), (30, 130), (50, 80), (100, 40), (1000, 40)];
        for (frames, expected) in cases {
            assert_eq!(frame_delay(frames), Duration::from_millis(expected), "{frames}");
        }
    }

    #[test]
    fn what_is_no_animation() {
        let path = Path::new("never/written.gif");
        assert_eq!(
            write_gif(path, &[]).unwrap_err().to_string(),
            "cannot encode `never/written.gif`: there are no frames"
        );
        let mut unlike = frames(1, 1);
        unlike.push(Picture::of(&[0.0; 4], [2, 2, 1]));
        assert!(write_gif(path, &unlike).unwrap_err().to_string().ends_with("the frames differ in size"));
        let wide = Picture::of(&vec![0.0; 70_000], [1, 70_000, 1]);
        assert!(write_gif(path, &[wide]).unwrap_err().to_string().starts_with("a 70000×1 picture is too large for"));
    }
}
