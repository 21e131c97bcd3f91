//! Winograd's convolutions on every instruction set of this machine, against the definition of a convolution in f64.
//!
//! Tolerance: the result is Aᵀ[Σ (G g Gᵀ) ⊙ (Bᵀ d B)]A in f32, each step of which rounds its sums. So it differs from the exact one by
//! at most about (K + 12)·ε times the same expression in absolute values (K terms in the sum; at most 2·2 additions in each transform
//! of d and g, 2·2 in that of the result): Higham, *Accuracy and Stability of Numerical Algorithms*, §3.1 and §3.5.

use super::{Numbers, levels, pool};
use crate::device::cpu::gemm::Init;
use crate::device::cpu::gemm::winograd::{self, Convolution, Filter};

type Matrix<const N: usize, const M: usize> = [[f64; M]; N];

/// The absolute values of Bᵀ, G and Aᵀ.
const B: Matrix<4, 4> = [[1., 0., 1., 0.], [0., 1., 1., 0.], [0., 1., 1., 0.], [0., 1., 0., 1.]];
const G: Matrix<4, 3> = [[1., 0., 0.], [0.5, 0.5, 0.5], [0.5, 0.5, 0.5], [0., 0., 1.]];
const A: Matrix<2, 4> = [[1., 1., 1., 0.], [0., 1., 1., 1.]];

/// m x mᵀ
fn both_sides<const N: usize, const M: usize>(m: &Matrix<N, M>, x: Matrix<M, M>) -> Matrix<N, N> {
    let mut y = [[0.0; N]; N];
    for (i, row) in y.iter_mut().enumerate() {
        for (j, y) in row.iter_mut().enumerate() {
            for k in 0..M {
                for l in 0..M {
                    *y += m[i][k] * x[k][l] * m[j][l];
                }
            }
        }
    }
    y
}

fn transposed<const N: usize, const M: usize>(m: &Matrix<N, M>) -> Matrix<M, N> {
    let mut t = [[0.0; N]; M];
    for i in 0..N {
        for j in 0..M {
            t[j][i] = m[i][j];
        }
    }
    t
}

/// A picture: absolute values of pixels, zeros outside.
struct Picture<'a> {
    s: &'a Convolution,
    channels: usize,
    data: &'a [f32],
}

impl Picture<'_> {
    fn at(&self, image: usize, y: isize, x: isize, c: usize) -> f64 {
        let (height, width) = (self.s.height as isize, self.s.width as isize);
        if !(0..height).contains(&y) || !(0..width).contains(&x) {
            return 0.0;
        }
        f64::from(self.data[((image as isize * height + y) * width + x) as usize * self.channels + c])
    }

    fn patch<const N: usize>(&self, image: usize, y: isize, x: isize, c: usize) -> Matrix<N, N> {
        let mut patch = [[0.0; N]; N];
        for (i, row) in patch.iter_mut().enumerate() {
            for (j, value) in row.iter_mut().enumerate() {
                *value = self.at(image, y + i as isize, x + j as isize, c).abs();
            }
        }
        patch
    }
}

fn filter(w: &[f32], channels: usize, o: usize, c: usize) -> Matrix<3, 3> {
    let mut g = [[0.0; 3]; 3];
    for (i, row) in g.iter_mut().enumerate() {
        for (j, g) in row.iter_mut().enumerate() {
            *g = f64::from(w[((o * 3 + i) * 3 + j) * channels + c]);
        }
    }
    g
}

fn add_products<const N: usize>(sum: &mut Matrix<N, N>, a: &Matrix<N, N>, b: &Matrix<N, N>) {
    for i in 0..N {
        for j in 0..N {
            sum[i][j] += a[i][j] * b[i][j];
        }
    }
}

fn abs<const N: usize>(m: Matrix<N, N>) -> Matrix<N, N> {
    m.map(|row| row.map(f64::abs))
}

fn assert_near(found: f32, exact: f64, terms: usize, size: f64, what: std::fmt::Arguments<'_>) {
    let bound = (terms + 12) as f64 * f64::from(f32::EPSILON) * size;
    assert!((f64::from(found) - exact).abs() <= bound, "{what}: {found} instead of {exact}, at most {bound:e} off");
}

fn random(numbers: &mut Numbers) -> Convolution {
    Convolution {
        images: numbers.size(1..4),
        height: numbers.size(1..12),
        width: numbers.size(1..12),
        channels: numbers.pick(&[1, 16, 20, 33, 64, 70, 130]),
        out: numbers.pick(&[1, 16, 24, 40, 64, 65, 90]),
    }
}

#[test]
fn convolutions_match_the_definition() {
    let mut numbers = Numbers(1);
    for round in 0..12 {
        let s = random(&mut numbers);
        let pixels = s.images * s.height * s.width;
        let (x, w) = (numbers.floats(pixels * s.channels), numbers.floats(s.out * 9 * s.channels));
        let (bias, residual) = (numbers.floats(s.out), numbers.floats(pixels * s.out));
        let before = numbers.floats(pixels * s.out);
        let picture = Picture { s: &s, channels: s.channels, data: &x };
        // The same weights as a convolution from `out` channels to `channels`, turned.
        let back = s.backward();
        for (level, turned) in levels().into_iter().flat_map(|level| [(level, false), (level, true)]) {
            let pool = pool(2);
            let mut filters = vec![f32::NAN; winograd::filters_len(&s)];
            let (how, weights) = if turned {
                // [C, 3, 3, O] with taps in the opposite order stand for the same filters.
                let mut turned = vec![0.0; w.len()];
                for (o, c, tap) in
                    (0..s.out * s.channels * 9).map(|i| (i / (9 * s.channels), i % s.channels, i / s.channels % 9))
                {
                    turned[(c * 9 + 8 - tap) * s.out + o] = w[(o * 9 + tap) * s.channels + c];
                }
                assert_eq!((back.channels, back.out), (s.out, s.channels));
                (Filter::Turned, turned)
            } else {
                (Filter::Upright, w.clone())
            };
            winograd::transform_filters_at(level, &pool, &s, how, &weights, &mut filters);
            let accumulate = round % 2 == 0;
            let mut y = if accumulate { before.clone() } else { vec![f32::NAN; before.len()] };
            let init = Init { bias: Some(&bias), accumulate, residual: (round % 3 == 0).then_some(&residual[..]) };
            winograd::convolve_at(level, &pool, &s, &x, &filters, &mut y, init);
            for (n, ty, tx, o) in tiles(&s, s.out) {
                let mut size = [[0.0; 4]; 4];
                for c in 0..s.channels {
                    let d = both_sides(&B, picture.patch::<4>(n, ty - 1, tx - 1, c));
                    add_products(&mut size, &both_sides(&G, abs(filter(&w, s.channels, o, c))), &d);
                }
                let size = both_sides(&A, size);
                for (i, j) in inside(&s, ty, tx) {
                    let at = ((n * s.height + ty as usize + i) * s.width + tx as usize + j) * s.out + o;
                    let mut exact = f64::from(bias[o]);
                    let mut size = size[i][j] + exact.abs();
                    for other in [accumulate.then_some(before[at]), init.residual.map(|r| r[at])].into_iter().flatten()
                    {
                        exact += f64::from(other);
                        size += f64::from(other).abs();
                    }
                    for c in 0..s.channels {
                        let g = filter(&w, s.channels, o, c);
                        for (u, v) in (0..9).map(|t| (t / 3, t % 3)) {
                            exact += g[u][v] * picture.at(n, ty + (i + u) as isize - 1, tx + (j + v) as isize - 1, c);
                        }
                    }
                    assert_near(y[at], exact, s.channels, size, format_args!("{s:?} {level:?} {how:?} {at}"));
                }
            }
        }
    }
}

/// Image, first line and column, and channel of every tile.
fn tiles(s: &Convolution, channels: usize) -> impl Iterator<Item = (usize, isize, isize, usize)> {
    let (images, height, width) = (s.images, s.height, s.width);
    (0..images).flat_map(move |n| {
        (0..height).step_by(2).flat_map(move |y| {
            (0..width).step_by(2).flat_map(move |x| (0..channels).map(move |c| (n, y as isize, x as isize, c)))
        })
    })
}

/// The pixels of a tile that are in the picture.
fn inside(s: &Convolution, y: isize, x: isize) -> impl Iterator<Item = (usize, usize)> {
    let (down, across) = (s.height - y as usize, s.width - x as usize);
    (0..4).map(|i| (i / 2, i % 2)).filter(move |&(i, j)| i < down && j < across)
}

#[test]
fn weight_gradients_match_the_definition() {
    let mut numbers = Numbers(2);
    // The last is cut into parts.
    let many = Convolution { images: 9, height: 17, width: 14, channels: 17, out: 5 };
    for (round, s) in (0..8).map(|_| random(&mut numbers)).chain([many]).collect::<Vec<_>>().into_iter().enumerate() {
        let pixels = s.images * s.height * s.width;
        let (x, dy) = (numbers.floats(pixels * s.channels), numbers.floats(pixels * s.out));
        let (x_picture, dy_picture) =
            (Picture { s: &s, channels: s.channels, data: &x }, Picture { s: &s, channels: s.out, data: &dy });
        let before = (numbers.floats(s.out * 9 * s.channels), numbers.floats(s.out));
        let accumulate = round % 2 == 0;
        let results: Vec<_> = levels()
            .into_iter()
            .map(|level| {
                let (mut dw, mut db) = before.clone();
                if !accumulate {
                    dw.fill(f32::NAN);
                    db.fill(f32::NAN);
                }
                winograd::weight_gradient_at(level, &pool(2), &s, &dy, &x, &mut dw, &mut db, accumulate);
                (level, dw, db)
            })
            .collect();
        let held = |value: f32| if accumulate { f64::from(value) } else { 0.0 };
        // Every channel pair costs a sum over the pictures in f64: a few of them.
        let pairs = (0..s.out * s.channels).step_by(1 + s.out * s.channels / 60);
        for (o, c) in pairs.map(|i| (i / s.channels, i % s.channels)) {
            let mut size = [[0.0; 4]; 4];
            let mut exact = [[0.0; 3]; 3];
            for (n, ty, tx, _) in tiles(&s, 1) {
                let d = both_sides(&B, x_picture.patch::<4>(n, ty - 1, tx - 1, c));
                add_products(&mut size, &both_sides(&transposed(&A), dy_picture.patch::<2>(n, ty, tx, o)), &d);
                for (i, j) in inside(&s, ty, tx) {
                    let dy = dy_picture.at(n, ty + i as isize, tx + j as isize, o);
                    for (u, v) in (0..9).map(|t| (t / 3, t % 3)) {
                        exact[u][v] += dy * x_picture.at(n, ty + (i + u) as isize - 1, tx + (j + v) as isize - 1, c);
                    }
                }
            }
            let size = both_sides(&transposed(&G), size);
            for (level, dw, _) in &results {
                for (u, v) in (0..9).map(|t| (t / 3, t % 3)) {
                    let at = ((o * 3 + u) * 3 + v) * s.channels + c;
                    let (exact, size) = (exact[u][v] + held(before.0[at]), size[u][v] + held(before.0[at]).abs());
                    assert_near(dw[at], exact, tiles(&s, 1).count(), size, format_args!("{s:?} {level:?} dw[{at}]"));
                }
            }
        }
        for o in 0..s.out {
            let all = || (0..pixels).map(|p| f64::from(dy[p * s.out + o]));
            let (exact, size) = (all().sum::<f64>() + held(before.1[o]), all().map(f64::abs).sum::<f64>() + 2.0);
            for (level, _, db) in &results {
                assert_near(db[o], exact, pixels, size, format_args!("{s:?} {level:?} db[{o}]"));
            }
        }
    }
}

#[test]
fn bits_do_not_depend_on_threads() {
    let s = Convolution { images: 6, height: 28, width: 27, channels: 40, out: 72 };
    assert!(s.pays());
    let mut numbers = Numbers(3);
    let pixels = s.images * s.height * s.width;
    let (x, dy) = (numbers.floats(pixels * s.channels), numbers.floats(pixels * s.out));
    let w = numbers.floats(s.out * 9 * s.channels);
    let run = |threads: usize| {
        let pool = pool(threads);
        let mut filters = vec![0.0; winograd::filters_len(&s)];
        winograd::transform_filters(&pool, &s, Filter::Upright, &w, &mut filters);
        let mut y = vec![0.0; dy.len()];
        winograd::convolve(&pool, &s, &x, &filters, &mut y, Init::ZERO);
        let (mut dw, mut db) = (vec![0.0; w.len()], vec![0.0; s.out]);
        winograd::weight_gradient(&pool, &s, &dy, &x, &mut dw, &mut db, false);
        [y, dw, db].concat().into_iter().map(f32::to_bits).collect::<Vec<_>>()
    };
    let one = run(1);
    assert!(one == run(2) && one == run(3));
}
