//! Row offsets of convolutions: which pixel of one picture meets which pixel of the other under a tap of the window.

use std::ops::Range;

use super::ZERO_ROW;

/// A convolution's geometry: `images` pictures of `height` × `width` pixels, `[N, H, W, C]`, seen through a sliding window.
///
/// Output pixel (y, x) sees input pixel (y·stride + kh − pad_top, x·stride + kw − pad_left) through tap (kh, kw), zeros
/// where that lies outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    pub images: usize,
    /// Input pixels.
    pub height: usize,
    pub width: usize,
    /// Output pixels.
    pub out_height: usize,
    pub out_width: usize,
    pub stride: usize,
    pub pad_top: usize,
    pub pad_left: usize,
}

/// The pixels of `[N, H, W]`, numbered by residue class: first all with y and x divisible by `stride`, and so on.
///
/// Inside a class the order is that of memory. The data gradient of a convolution with stride s sees only some of the
/// taps in each class, so this order lets a product leave the others out. With stride 1 it is the order of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    pub images: usize,
    pub height: usize,
    pub width: usize,
    pub stride: usize,
}

impl Window {
    /// An odd square window with stride 1 that keeps the size.
    pub fn same(images: usize, height: usize, width: usize, window: usize) -> Self {
        let pad = window / 2;
        Window { images, height, width, out_height: height, out_width: width, stride: 1, pad_top: pad, pad_left: pad }
    }

    /// A 3×3 window with stride 2 that halves the size, padded at the bottom and on the right only.
    pub fn halving(images: usize, height: usize, width: usize) -> Self {
        let (out_height, out_width) = (height / 2, width / 2);
        Window { images, height, width, out_height, out_width, stride: 2, pad_top: 0, pad_left: 0 }
    }

    /// Output pixels of all images: the rows of the forward product and of the weight gradient.
    pub fn outputs(&self) -> usize {
        self.images * self.out_height * self.out_width
    }

    /// Input pixels of all images: the rows of the data gradient.
    pub fn inputs(&self) -> usize {
        self.images * self.height * self.width
    }

    /// The order in which [`output_offsets`](Self::output_offsets) numbers the input pixels.
    pub fn input_grid(&self) -> Grid {
        Grid { images: self.images, height: self.height, width: self.width, stride: self.stride }
    }

    /// For each output pixel in `rows` (in the order of memory), the offset of the input pixel under tap (kh, kw) in a
    /// tensor with `ld` floats per pixel: fprop and wgrad.
    pub fn input_offsets(&self, kh: usize, kw: usize, rows: Range<usize>, ld: usize, out: &mut [usize]) {
        let Window { height, width, stride, pad_top, pad_left, .. } = *self;
        if rows.is_empty() {
            return; // perhaps because there is no output
        }
        let mut rest = &mut out[..rows.len()];
        let (line, mut x) = (rows.start / self.out_width, rows.start % self.out_width);
        let (mut image, mut y) = (line / self.out_height, line % self.out_height);
        while !rest.is_empty() {
            let (now, later) = rest.split_at_mut((self.out_width - x).min(rest.len()));
            // Wrapping makes what lies before the first pixel a huge number.
            let iy = (y * stride + kh).wrapping_sub(pad_top);
            if iy < height {
                let line = (image * height + iy) * width;
                // The first output pixel of the line that sees an input pixel, and the first after those.
                let first = pad_left.saturating_sub(kw).div_ceil(stride);
                let end = (width + pad_left).saturating_sub(kw).div_ceil(stride);
                ramp(now, x, first..end, (line + first * stride + kw).wrapping_sub(pad_left) * ld, stride * ld);
            } else {
                now.fill(ZERO_ROW);
            }
            rest = later;
            x = 0;
            y += 1;
            if y == self.out_height {
                (image, y) = (image + 1, 0);
            }
        }
    }

    /// For each input pixel in `rows` (numbered by [`input_grid`](Self::input_grid)), the offset of the output pixel that
    /// sees it through tap (kh, kw), in a tensor with `ld` floats per pixel: dgrad.
    pub fn output_offsets(&self, kh: usize, kw: usize, rows: Range<usize>, ld: usize, out: &mut [usize]) {
        let Window { out_height, out_width, stride, pad_top, pad_left, .. } = *self;
        let mut rest = out;
        self.input_grid().for_each_line(rows, |image, iy, first_ix, count| {
            let (now, later) = std::mem::take(&mut rest).split_at_mut(count);
            rest = later;
            // y = (iy + pad_top − kh) / stride where that is whole; wrapping makes what lies before 0 a huge number.
            let (ty, tx) = (iy + pad_top, first_ix + pad_left);
            let y = (ty / stride).wrapping_sub(kh / stride);
            if ty % stride != kh % stride || tx % stride != kw % stride || y >= out_height {
                return now.fill(ZERO_ROW);
            }
            let line = (image * out_height + y) * out_width;
            let first = kw / stride;
            ramp(now, tx / stride, first..first + out_width, line * ld, ld);
        });
    }
}

crate::multiversion! {
    /// Offsets of pixels `from..` of a line: those in `seen` are `start`, `start + step`, …, the others padding.
    fn ramp(out: &mut [usize], from: usize, seen: Range<usize>, start: usize, step: usize) {
        let first = seen.start.saturating_sub(from).min(out.len());
        let end = seen.end.saturating_sub(from).clamp(first, out.len());
        out[..first].fill(ZERO_ROW);
        out[end..].fill(ZERO_ROW);
        let mut offset = start + (from + first).saturating_sub(seen.start) * step;
        for out in &mut out[first..end] {
            *out = offset;
            offset += step;
        }
    }
}

impl Grid {
    /// Number of pixels.
    pub fn len(&self) -> usize {
        self.images * self.height * self.width
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Place in memory order of the `row`-th pixel in this order.
    pub fn pixel(&self, row: usize) -> usize {
        let mut pixel = 0;
        self.for_each_line(row..row + 1, |image, y, x, _| pixel = (image * self.height + y) * self.width + x);
        pixel
    }

    /// Calls `f(image, y, first x, count)` for every run of pixels in `rows` that are in one line of one class: their x are
    /// `stride` apart.
    pub fn for_each_line(&self, rows: Range<usize>, mut f: impl FnMut(usize, usize, usize, usize)) {
        let Grid { images, height, width, stride } = *self;
        let (mut start, end) = (rows.start, rows.end);
        let mut class_start = 0;
        for class in 0..stride * stride {
            let (py, px) = (class / stride, class % stride);
            // Lines and pixels per line of this class.
            let (lines, across) = ((height + stride - 1 - py) / stride, (width + stride - 1 - px) / stride);
            let class_end = class_start + images * lines * across;
            while start < end.min(class_end) {
                let (line, x) = ((start - class_start) / across, (start - class_start) % across);
                let count = (across - x).min(end - start);
                f(line / lines, (line % lines) * stride + py, x * stride + px, count);
                start += count;
            }
            class_start = class_end;
        }
    }
}
