//! The CPU device's matrix products on shapes of convolutions, beside the `gemm` crate on a plain product of the same size
//! (which a convolution could use only after unfolding its input, not counted here), and the 3×3 convolutions in Winograd's form, which is
//! the one that is used where it pays. Speeds are those of the plain products: 2 FLOPs for each term of the definition.
//!
//! `cargo bench --bench gemm -- [threads] [name]`

use std::ops::{Deref, DerefMut};
use std::time::Instant;

use ::gemm as peer;
use ddpm_dist::device::cpu::Pool;
use ddpm_dist::device::cpu::gemm::winograd::{self, Convolution, Filter};
use ddpm_dist::device::cpu::gemm::{self, Init, OutRows, Rows, Segment, window::Window};

struct Shape {
    name: &'static str,
    window: Window,
    /// Along one side.
    size: usize,
    cin: usize,
    cout: usize,
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    let threads = arguments.first().and_then(|a| a.parse().ok()).unwrap_or(2);
    let wanted = arguments.get(1).cloned().unwrap_or_default();
    let pool = Pool::new(threads);
    println!("{threads} threads, {}", ddpm_dist::simd::level().name());
    println!("{:<24} {:>6} {:>16} {:>16} {:>16}   GFLOP/s", "", "", "direct", "Winograd", "gemm crate");
    println!(
        "{:<24} {:>6} {:>8}{:>8} {:>8}{:>8} {:>8}{:>8}",
        "shape", "form", "median", "best", "median", "best", "median", "best"
    );
    for shape in shapes().iter().filter(|s| s.name.contains(&wanted)) {
        measure(shape, &pool, threads);
    }
}

fn shapes() -> Vec<Shape> {
    let same = |name, images, pixels, size, cin, cout| Shape {
        name,
        window: Window::same(images, pixels, pixels, size),
        size,
        cin,
        cout,
    };
    vec![
        same("3x3 128>128 32² ×16", 16, 32, 3, 128, 128),
        same("3x3 32>32 28² ×32", 32, 28, 3, 32, 32),
        same("3x3 64>64 14² ×32", 32, 14, 3, 64, 64),
        same("3x3 128>128 7² ×32", 32, 7, 3, 128, 128),
        same("3x3 256>256 16² ×16", 16, 16, 3, 256, 256),
        same("3x3 512>256 16² ×16", 16, 16, 3, 512, 256),
        same("3x3 256>256 4² ×16", 16, 4, 3, 256, 256),
        same("3x3 512>512 4² ×16", 16, 4, 3, 512, 512),
        same("3x3 3>128 32² ×16", 16, 32, 3, 3, 128),
        same("3x3 128>3 32² ×16", 16, 32, 3, 128, 3),
        same("3x3 1>32 28² ×32", 32, 28, 3, 1, 32),
        same("3x3 32>1 28² ×32", 32, 28, 3, 32, 1),
        same("1x1 256>256 16² ×16", 16, 16, 1, 256, 256),
        same("1x1 128>128 32² ×16", 16, 32, 1, 128, 128),
        same("linear 128>512 ×16", 16, 1, 1, 128, 512),
        Shape { name: "3x3/2 128>128 32² ×16", window: Window::halving(16, 32, 32), size: 3, cin: 128, cout: 128 },
    ]
}

/// Median and shortest time of `f` in seconds, over about a third of a second.
fn time(mut f: impl FnMut()) -> (f64, f64) {
    f();
    let begin = Instant::now();
    let mut times = Vec::new();
    while times.len() < 5 || begin.elapsed().as_secs_f64() < 0.33 {
        let start = Instant::now();
        f();
        times.push(start.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    (times[times.len() / 2], times[0])
}

/// Floats aligned as a program's buffers are: rows that straddle cache lines would cost up to a third of the speed.
struct Floats(Vec<f32>, usize, usize);

impl Floats {
    fn zeros(n: usize) -> Self {
        let values = vec![0.0; n + 16];
        let skip = values.as_ptr().align_offset(64);
        Floats(values, skip, n)
    }

    fn random(n: usize) -> Self {
        let mut floats = Self::zeros(n);
        for (i, x) in floats.iter_mut().enumerate() {
            *x = ((i as u32).wrapping_mul(2654435761) >> 16) as f32 / 65536.0 - 0.5;
        }
        floats
    }
}

impl Deref for Floats {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.0[self.1..self.1 + self.2]
    }
}

impl DerefMut for Floats {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.0[self.1..self.1 + self.2]
    }
}

fn measure(shape: &Shape, pool: &Pool, threads: usize) {
    let Shape { name, window, size, cin, cout } = *shape;
    let taps = size * size;
    let (rows_in, rows_out) = (window.inputs(), window.outputs());
    let (x, w, dy) =
        (Floats::random(rows_in * cin), Floats::random(cout * taps * cin), Floats::random(rows_out * cout));
    let (mut y, mut dx, mut dw, mut db) =
        (Floats::zeros(dy.len()), Floats::zeros(x.len()), Floats::zeros(w.len()), Floats::zeros(cout));
    let flops = 2.0 * (rows_out * cout * taps * cin) as f64;
    let inputs = vec![Segment { data: &x, k: cin }; taps];
    let forward = |tap: usize, rows, out: &mut [usize]| window.input_offsets(tap / size, tap % size, rows, cin, out);
    let a = Rows { segments: &inputs, offsets: &forward };
    let report = |form: &str, direct: (f64, f64), fewer: Option<(f64, f64)>, peer: (f64, f64)| {
        let speeds = |(median, best): (f64, f64)| {
            let speed = |seconds: f64| format!("{:>8.0}", flops / seconds / 1e9);
            speed(median) + &speed(best)
        };
        let fewer = fewer.map_or_else(String::new, speeds);
        println!("{name:<24} {form:>6} {} {fewer:>16} {}", speeds(direct), speeds(peer));
    };
    let Window { images, height, width, stride, .. } = window;
    let convolution = Convolution { images, height, width, channels: cin, out: cout };
    let pays = size == 3 && stride == 1 && convolution.pays();

    // Forward: the time includes packing the weights.
    let mut packed = Floats::zeros(gemm::packed_len(cout, taps * cin));
    let linear = OutRows::Linear { start: 0, ld: cout };
    let fprop = time(|| {
        gemm::pack_transposed(pool, &w, cout, taps * cin, &mut packed);
        gemm::rows_times_packed(pool, &a, rows_out, cout, &packed, &mut y, linear, Init::ZERO);
    });
    let mut filters = Floats::zeros(winograd::filters_len(&convolution));
    let fewer = pays.then(|| {
        time(|| {
            winograd::transform_filters(pool, &convolution, Filter::Upright, &w, &mut filters);
            winograd::convolve(pool, &convolution, &x, &filters, &mut y, Init::ZERO);
        })
    });
    report("fprop", fprop, fewer, beside(rows_out, cout, taps * cin, threads, false));

    let outputs = vec![Segment { data: &dy, k: cout }; taps];
    let backward = |tap: usize, rows, out: &mut [usize]| window.output_offsets(tap / size, tap % size, rows, cout, out);
    let da = Rows { segments: &outputs, offsets: &backward };
    let mut packed = Floats::zeros(gemm::packed_len(cin, taps * cout));
    let row = |i: usize| (i % cout * taps + i / cout) * cin;
    let grid = OutRows::Grid { grid: window.input_grid(), start: 0, ld: cin };
    let dgrad = time(|| {
        gemm::pack_rows(pool, cin, taps * cout, row, &w, &mut packed);
        gemm::rows_times_packed(pool, &da, rows_in, cin, &packed, &mut dx, grid, Init::ZERO);
    });
    let back = convolution.backward();
    let mut filters = Floats::zeros(winograd::filters_len(&back));
    let fewer = pays.then(|| {
        time(|| {
            winograd::transform_filters(pool, &back, Filter::Turned, &w, &mut filters);
            winograd::convolve(pool, &back, &dy, &filters, &mut dx, Init::ZERO);
        })
    });
    report("dgrad", dgrad, fewer, beside(rows_out, cin, taps * cout, threads, false));

    let wgrad =
        time(|| gemm::transposed_times_rows(pool, &dy, cout, cout, &a, rows_out, &mut dw, false, Some(&mut db)));
    let fewer = pays.then(|| time(|| winograd::weight_gradient(pool, &convolution, &dy, &x, &mut dw, &mut db, false)));
    report("wgrad", wgrad, fewer, beside(cout, taps * cin, rows_out, threads, true));
    std::hint::black_box((y, dx, dw, db));
}

/// Times of the `gemm` crate on C[m, n] = A·B with B row-major and A row-major or, if `transposed`, its transpose.
fn beside(m: usize, n: usize, k: usize, threads: usize, transposed: bool) -> (f64, f64) {
    let (a, b, mut c) = (Floats::random(m * k), Floats::random(k * n), Floats::zeros(m * n));
    let (a_column, a_row) = if transposed { (m as isize, 1) } else { (1, k as isize) };
    let parallelism = if threads == 1 { peer::Parallelism::None } else { peer::Parallelism::Rayon(threads) };
    let (columns, one) = (n as isize, 1.0f32);
    let times = time(|| {
        // SAFETY: the matrices are as long as their sizes and strides say.
        unsafe {
            peer::gemm(
                m,
                n,
                k,
                c.as_mut_ptr(),
                1,
                columns,
                false,
                a.as_ptr(),
                a_column,
                a_row,
                b.as_ptr(),
                1,
                columns,
                0.0,
                one,
                false,
                false,
                false,
                parallelism,
            );
        }
    });
    std::hint::black_box(c);
    times
}
