use super::{Stride, conv2d};
use crate::ops::add::add;
use crate::ops::testing::{Case, Input, Outcome, assert_close, random, ulps};
use crate::tape::{Tape, Var};

/// The sizes of a convolution.
#[derive(Clone, Copy)]
struct Size {
    images: usize,
    height: usize,
    width: usize,
    channels: usize,
    out: usize,
    stride: usize,
}

impl Size {
    fn rows(&self) -> usize {
        self.images * (self.height / self.stride) * (self.width / self.stride)
    }

    /// Calls `f(y, x, w)` with the indices of every product of the sum.
    fn each_product(&self, mut f: impl FnMut(usize, usize, usize)) {
        let Size { images, height, width, channels, out, stride } = *self;
        let padding = if stride == 1 { 1 } else { 0 };
        let (oh, ow) = (height / stride, width / stride);
        for (n, i, j) in itertools(images, oh, ow) {
            for (u, v, c) in itertools(3, 3, channels) {
                let (y, x) = ((i * stride + u).wrapping_sub(padding), (j * stride + v).wrapping_sub(padding));
                if y < height && x < width {
                    for o in 0..out {
                        f(
                            ((n * oh + i) * ow + j) * out + o,
                            ((n * height + y) * width + x) * channels + c,
                            ((o * 3 + u) * 3 + v) * channels + c,
                        );
                    }
                }
            }
        }
    }
}

fn itertools(a: usize, b: usize, c: usize) -> impl Iterator<Item = (usize, usize, usize)> {
    (0..a * b * c).map(move |i| (i / (b * c), i / c % b, i % c))
}

fn stride(stride: usize) -> Stride {
    if stride == 1 { Stride::One } else { Stride::Two }
}

fn run(s: Size, [x, w, b, dy]: [&[f32]; 4], threads: usize) -> Outcome {
    let inputs = vec![
        Input::f32("x", [s.images, s.height, s.width, s.channels], x),
        Input::f32("w", [s.out, 3, 3, s.channels], w),
        Input::f32("b", [s.out], b),
    ];
    Case::new(inputs).threads(threads).run(dy, |tape, v| conv2d(tape, v[0], v[1], v[2], stride(s.stride)))
}

#[test]
fn matches_f64() {
    let size = |images, height, width, channels, out, stride| Size { images, height, width, channels, out, stride };
    for s in [
        size(1, 1, 1, 1, 1, 1),
        size(2, 5, 7, 3, 20, 1),
        size(1, 4, 3, 33, 17, 1),
        size(3, 9, 8, 16, 1, 1),
        size(2, 8, 8, 64, 3, 1),
        size(3, 11, 10, 20, 33, 1),
        size(2, 12, 13, 64, 16, 1),
        size(1, 2, 2, 5, 4, 2),
        size(2, 8, 6, 20, 33, 2),
    ] {
        let (x, w) = (random(1, s.images * s.height * s.width * s.channels), random(2, s.out * 9 * s.channels));
        let (b, dy) = (random(3, s.out), random(4, s.rows() * s.out));
        let result = run(s, [&x, &w, &b, &dy], 2);
        let f = |v: &[f32], i: usize| f64::from(v[i]);
        let mut y: Vec<f64> = (0..dy.len()).map(|i| f(&b, i % s.out)).collect();
        // Each sum's derivative is read off the same products: they are bilinear.
        let (mut dx, mut dw) = (vec![0.0; x.len()], vec![0.0; w.len()]);
        s.each_product(|iy, ix, iw| {
            y[iy] += f(&x, ix) * f(&w, iw);
            dx[ix] += f(&dy, iy) * f(&w, iw);
            dw[iw] += f(&dy, iy) * f(&x, ix);
        });
        assert_close("y", &result.y, y, ulps(9 * s.channels));
        assert_close("dx", &result.gradient("x"), dx, ulps(9 * s.out));
        assert_close("dw", &result.gradient("w"), dw, ulps(s.rows()));
        let db = (0..s.out).map(|o| (0..s.rows()).map(|r| f(&dy, r * s.out + o)).sum());
        assert_close("db", &result.gradient("b"), db, ulps(s.rows()));
    }
}

#[test]
fn gradients_are_differences_of_the_output() {
    let s = Size { images: 2, height: 4, width: 6, channels: 5, out: 7, stride: 2 };
    let (x, w) = (random(1, 2 * 24 * 5), random(2, 7 * 9 * 5));
    let (b, dy) = (random(3, 7), random(4, s.rows() * 7));
    let result = run(s, [&x, &w, &b, &dy], 2);
    // <dy, f(x + h·e) − f(x − h·e)>/2h; f is linear in each operand, so h may be large.
    let difference = |operand: usize, i: usize| -> f64 {
        let y = |h: f32| {
            let mut operands = [x.clone(), w.clone(), b.clone()];
            operands[operand][i] += h;
            run(s, [&operands[0], &operands[1], &operands[2], &dy], 1).y
        };
        let (up, down) = (y(1.0), y(-1.0));
        up.iter().zip(&down).zip(&dy).map(|((u, d), dy)| f64::from(u - d) / 2.0 * f64::from(*dy)).sum()
    };
    for (operand, name, len) in [(0, "x", x.len()), (1, "w", w.len()), (2, "b", b.len())] {
        let gradient = result.gradient(name);
        for i in (0..len).step_by(1 + len / 11) {
            let expected = difference(operand, i);
            // Differences of f32 values of size ~10, summed over the outputs that an element reaches.
            let tolerance = 10.0 * f64::from(f32::EPSILON) * (s.rows() as f64) * 3.0;
            assert!((f64::from(gradient[i]) - expected).abs() < tolerance, "d{name}[{i}]: {} {expected}", gradient[i]);
        }
    }
}

#[test]
fn a_residual_is_added_by_the_convolution_itself() {
    let (x, w, b) = (random(1, 2 * 30 * 4), random(2, 4 * 9 * 4), random(3, 4));
    let dy = random(4, x.len());
    let build = |fuse: bool| {
        move |tape: &mut Tape, v: &[Var]| {
            let y = conv2d(tape, v[0], v[1], v[2], Stride::One);
            let sum = add(tape, v[0], y);
            if fuse {
                tape.fuse_residuals(|op| op == "add");
            }
            sum
        }
    };
    let inputs =
        || vec![Input::f32("x", [2, 5, 6, 4], &x), Input::f32("w", [4, 3, 3, 4], &w), Input::f32("b", [4], &b)];
    let fused = Case::new(inputs()).run(&dy, build(true));
    let apart = Case::new(inputs()).run(&dy, build(false));
    assert_close("y", &fused.y, apart.y.iter().map(|&y| f64::from(y)), 8.0);
    for name in ["x", "w", "b"] {
        assert_close(name, &fused.gradient(name), apart.gradient(name).iter().map(|&g| f64::from(g)), 8.0);
    }
}

#[test]
fn bits_do_not_depend_on_threads() {
    for stride in [1, 2] {
        let s = Size { images: 3, height: 14, width: 14, channels: 24, out: 40, stride };
        let (x, w) = (random(1, 3 * 196 * 24), random(2, 40 * 9 * 24));
        let (b, dy) = (random(3, 40), random(4, s.rows() * 40));
        let bits = |threads| {
            let result = run(s, [&x, &w, &b, &dy], threads);
            (result.gradient("x"), result.gradient("w"), result.gradient("b"), result.y)
        };
        assert!(bits(1) == bits(2) && bits(1) == bits(3));
    }
}
