//! Scaling down with a Lanczos filter, computing only what the centre crop keeps.

use super::ImageSize;
use crate::multiversion;

/// Lobes on each side of the filter: the a of sinc(x)·sinc(x/a).
const LOBES: f64 = 3.0;

/// Scales `pixels`, `[height, width, C]`, to the smallest size that covers `to` and writes its centre, `[H, W, C]`.
///
/// Pictures are scaled in the values of the file (no gamma), as everyone does who trains on them. `to` is at most `from` in
/// both directions: nothing is enlarged.
pub(super) fn cover(pixels: &[u8], from: ImageSize, channels: usize, to: ImageSize, out: &mut [u8]) {
    let scaled = covering(from, to);
    let rows = taps(from.height, scaled.height, to.height);
    let columns = taps(from.width, scaled.width, to.width);
    // The source columns that some kept column reads.
    let first = columns.first().map_or(0, |t| t.start);
    let last = columns.last().map_or(0, |t| t.start + t.weights.len());
    let stride = from.width * channels;
    let mut line = vec![0.0f32; (last - first) * channels];
    for (row, out) in rows.iter().zip(out.chunks_exact_mut(to.width * channels)) {
        // Down the columns first: that pass runs along whole rows, and leaves few rows for the other.
        line.fill(0.0);
        for (weight, source) in row.weights.iter().zip(pixels.chunks_exact(stride).skip(row.start)) {
            add_scaled(&mut line, &source[first * channels..last * channels], *weight);
        }
        match channels {
            1 => across::<1>(&line, first, &columns, out),
            _ => across::<3>(&line, first, &columns, out),
        }
    }
}

/// The smallest size with the proportions of `from` that covers `to`; one side is that of `to`, the other is rounded.
fn covering(from: ImageSize, to: ImageSize) -> ImageSize {
    let rounded = |side: usize, numerator: usize, denominator: usize| {
        ((2 * side as u128 * numerator as u128 + denominator as u128) / (2 * denominator as u128)) as usize
    };
    if from.width as u128 * to.height as u128 >= from.height as u128 * to.width as u128 {
        ImageSize { height: to.height, width: rounded(from.width, to.height, from.height).max(to.width) }
    } else {
        ImageSize { height: rounded(from.height, to.width, from.width).max(to.height), width: to.width }
    }
}

/// What one row or column of the result is made of.
struct Taps {
    /// The first source row or column.
    start: usize,
    /// One weight for each from there on; their sum is 1.
    weights: Vec<f32>,
}

/// The taps of the central `keep` of `to` places that are spread over `from`.
fn taps(from: usize, to: usize, keep: usize) -> Vec<Taps> {
    let ratio = from as f64 / to as f64;
    let skip = (to - keep) / 2;
    let one = |place: usize| {
        if from == to {
            return Taps { start: place, weights: vec![1.0] };
        }
        // Pixel i covers i to i + 1; the filter is as wide as the result's pixels are in the source.
        let center = (place as f64 + 0.5) * ratio;
        let start = (center - LOBES * ratio).floor().max(0.0) as usize;
        let end = ((center + LOBES * ratio).ceil() as usize).min(from);
        let weights: Vec<f64> = (start..end).map(|i| lanczos((i as f64 + 0.5 - center) / ratio)).collect();
        let sum: f64 = weights.iter().sum();
        Taps { start, weights: weights.iter().map(|w| (w / sum) as f32).collect() }
    };
    (skip..skip + keep).map(one).collect()
}

/// sinc(x)·sinc(x/3) within three lobes, with sinc(x) = sin(πx)/(πx).
fn lanczos(x: f64) -> f64 {
    let sinc = |x: f64| if x == 0.0 { 1.0 } else { (std::f64::consts::PI * x).sin() / (std::f64::consts::PI * x) };
    if x.abs() < LOBES { sinc(x) * sinc(x / LOBES) } else { 0.0 }
}

multiversion! {
    /// `line` += `weight`·`source`.
    fn add_scaled(line: &mut [f32], source: &[u8], weight: f32) {
        for (sum, value) in line.iter_mut().zip(source) {
            *sum += weight * f32::from(*value);
        }
    }
}

/// Filters one row and rounds it to bytes.
fn across<const C: usize>(line: &[f32], first: usize, columns: &[Taps], out: &mut [u8]) {
    for (taps, pixel) in columns.iter().zip(out.chunks_exact_mut(C)) {
        let mut sum = [0.0f32; C];
        for (weight, value) in taps.weights.iter().zip(line[(taps.start - first) * C..].chunks_exact(C)) {
            for (sum, value) in sum.iter_mut().zip(value) {
                *sum += weight * value;
            }
        }
        for (byte, sum) in pixel.iter_mut().zip(sum) {
            *byte = (sum + 0.5) as u8; // `as` clamps to 0 … 255, which the negative lobes leave
        }
    }
}

#[cfg(test)]
mod tests {
    use image::imageops::{self, FilterType};
    use image::{ImageBuffer, Rgb};

    use super::*;

    fn picture(height: usize, width: usize) -> Vec<u8> {
        (0..height * width * 3).map(|i| (i * i % 251) as u8 ^ (i / 7) as u8).collect()
    }

    /// The definition, in f64 and two dimensions at once.
    fn reference(pixels: &[u8], from: ImageSize, scaled: ImageSize, row: usize, column: usize, channel: usize) -> f64 {
        let (down, right) = (from.height as f64 / scaled.height as f64, from.width as f64 / scaled.width as f64);
        let (mut sum, mut weights) = (0.0, 0.0);
        for y in 0..from.height {
            for x in 0..from.width {
                let weight = lanczos((y as f64 + 0.5) / down - row as f64 - 0.5)
                    * lanczos((x as f64 + 0.5) / right - column as f64 - 0.5);
                sum += weight * f64::from(pixels[(y * from.width + x) * 3 + channel]);
                weights += weight;
            }
        }
        (sum / weights).clamp(0.0, 255.0)
    }

    #[test]
    fn the_result_is_the_centre_of_the_filtered_picture() {
        for (from, to) in [([31, 47], [8, 8]), ([47, 31], [8, 9]), ([20, 20], [7, 3]), ([33, 12], [11, 12])] {
            let size = |[height, width]: [usize; 2]| ImageSize { height, width };
            let (from, to) = (size(from), size(to));
            let pixels = picture(from.height, from.width);
            let scaled = covering(from, to);
            assert!(scaled.height == to.height || scaled.width == to.width);
            let mut out = vec![0; to.height * to.width * 3];
            cover(&pixels, from, 3, to, &mut out);
            let (top, left) = ((scaled.height - to.height) / 2, (scaled.width - to.width) / 2);
            for (i, value) in out.iter().enumerate() {
                let (row, column, channel) = (i / 3 / to.width, i / 3 % to.width, i % 3);
                let exact = if scaled == from {
                    f64::from(pixels[((row + top) * from.width + column + left) * 3 + channel])
                } else {
                    reference(&pixels, from, scaled, row + top, column + left, channel)
                };
                // Half for rounding, and the rounding errors of f32 sums of values up to 255.
                assert!((f64::from(*value) - exact).abs() <= 0.501, "{from} to {to}: {value} for {exact}");
            }
        }
    }

    #[test]
    fn another_implementation_agrees() {
        let (from, to) = (ImageSize { height: 60, width: 90 }, ImageSize { height: 24, width: 36 });
        let pixels = picture(60, 90);
        let mut out = vec![0; 24 * 36 * 3];
        cover(&pixels, from, 3, to, &mut out);
        let peer: ImageBuffer<Rgb<u8>, _> = ImageBuffer::from_raw(90, 60, pixels).unwrap();
        let peer = imageops::resize(&peer, 36, 24, FilterType::Lanczos3).into_raw();
        for (a, b) in out.iter().zip(&peer) {
            assert!(a.abs_diff(*b) <= 1, "{a} and {b}");
        }
    }
}
