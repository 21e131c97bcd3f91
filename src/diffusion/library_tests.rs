//! Schedules, q and predictions against denoising-diffusion-pytorch and diffusers: every tensor of `tests/reference/q_sample.safetensors`,
//! which `tests/reference/q_sample.py` made in f64.

use super::*;
use crate::ops::testing::Reference;
use std::collections::BTreeSet;

/// The libraries' values, and which of them were compared.
struct Library {
    file: Reference,
    read: BTreeSet<String>,
}

impl Library {
    fn read(&mut self, name: &str) -> Vec<f64> {
        self.read.insert(name.to_owned());
        self.file.f64(name)
    }

    /// A table kept in f64, compared to `relative` of each value.
    fn table(&mut self, name: &str, found: impl IntoIterator<Item = f64>, relative: f64) {
        let expected = self.read(name);
        let found: Vec<f64> = found.into_iter().collect();
        assert_eq!(found.len(), expected.len(), "{name}");
        for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
            let error = (found - expected).abs();
            assert!(error <= relative * expected.abs(), "{name}[{i}]: {found:e} instead of {expected:e}");
        }
    }
}

/// The process that a library calls by this name. denoising-diffusion-pytorch scales both ends of the linear schedule by 1000/T.
fn process(library: &str, schedule: &str, timesteps: usize) -> Schedule {
    let scale = if library == "ddpm_pytorch" { 1000.0 / timesteps as f64 } else { 1.0 };
    let schedule = match schedule {
        "linear" => BetaSchedule::Linear,
        "scaled_linear" => BetaSchedule::ScaledLinear,
        _ => BetaSchedule::Cosine,
    };
    let (beta_start, beta_end) = (scale * 1e-4, scale * 0.02);
    Schedule::new(&DiffusionConfig { timesteps, schedule, beta_start, beta_end, ..Default::default() }).unwrap()
}

#[test]
fn every_formula_is_that_of_the_libraries() {
    let mut library = Library { file: Reference::open("q_sample.safetensors"), read: BTreeSet::new() };
    for (name, schedule, timesteps) in [
        ("ddpm_pytorch", "linear", 1000),
        ("ddpm_pytorch", "linear", 100),
        ("ddpm_pytorch", "cosine", 1000),
        ("ddpm_pytorch", "cosine", 100),
        ("diffusers", "linear", 1000),
        ("diffusers", "linear", 100),
        ("diffusers", "cosine", 1000),
        ("diffusers", "cosine", 100),
        ("diffusers", "scaled_linear", 1000),
    ] {
        let s = process(name, schedule, timesteps);
        let key = |table: &str| format!("{name}/{schedule}_T{timesteps}/{table}");
        // Cosine's β are what is left of 1: known to ε/β. ᾱ is a product of up to T factors, each off by up to an ε.
        let smallest = s.betas.iter().copied().fold(1.0, f64::min);
        library.table(&key("betas"), s.betas.iter().copied(), 4.0 * f64::EPSILON / smallest);
        library.table(&key("alphas_cumprod"), s.alphas_cumprod.iter().copied(), 4.0 * f64::EPSILON * timesteps as f64);
    }

    let [x0, noise, x_t] = ["x0", "noise", "x_t"].map(|name| library.read(name));
    let t: Vec<usize> = library.read("t").iter().map(|&t| t as usize).collect();
    let image = x0.len() / t.len();
    for schedule in ["linear", "cosine"] {
        let s = process("diffusers", schedule, 1000);
        // 1 − ᾱ_0 is known to ε/(1 − ᾱ_0), 5e-12 for cosine: all that f64 leaves between the libraries and here.
        let known = 4.0 * f64::EPSILON / (1.0 - s.alphas_cumprod[0]);
        let table = |key: &str| format!("ddpm_pytorch/{schedule}/{key}");
        library.table(&table("posterior_variance"), t.iter().map(|&t| s.posterior_variance[t]), known);
        // At t = 0, where the logarithm is −∞, that library has ln 1e-20; the paper's code and this one repeat the next value.
        let logs = library.read(&table("posterior_log_variance_clipped"));
        assert_eq!((t[0], t[1]), (0, 1));
        assert!((logs[0] - 1e-20f64.ln()).abs() < 1e-12, "{}", logs[0]);
        for (&t, log) in t.iter().zip([&logs[1..2], &logs[1..]].concat()) {
            // The logarithm turns a relative error into an absolute one.
            let found = s.posterior_log_variance_clipped[t];
            assert!(
                (found - log).abs() <= known + 4.0 * f64::EPSILON * log.abs(),
                "{schedule} t = {t}: {found}, {log}"
            );
        }

        // A formula of (x_0, ε or v, x_t) at t, and the sizes of the terms it adds up.
        type Formula<'f> = &'f dyn Fn(usize, [f64; 3]) -> (f64, f64);
        let [signal, sigma] = [0, 1].map(|k| move |s: &Schedule, t: usize| s.q_sample_coefficients(t)[k]);
        let start_from_noise = |t: usize, [_, e, x]: [f64; 3]| {
            (s.predict_start_from_noise(x, t, e), (x.abs() + sigma(&s, t) * e.abs()) / signal(&s, t))
        };
        let noise_from_start = |t: usize, [x0, _, x]: [f64; 3]| {
            (s.predict_noise_from_start(x, t, x0), (x.abs() + signal(&s, t) * x0.abs()) / sigma(&s, t))
        };
        let q_sample = |t: usize, [x0, e, _]: [f64; 3]| (s.q_sample(x0, t, e), x0.abs() + e.abs());
        let v = |t: usize, [x0, e, _]: [f64; 3]| (s.predict_v(x0, t, e), x0.abs() + e.abs());
        let start_from_v = |t: usize, [_, v, x]: [f64; 3]| (s.predict_start_from_v(x, t, v), x.abs() + v.abs());
        let posterior = |t: usize, [x0, _, x]: [f64; 3]| (s.q_posterior(x0, x, t).0, x0.abs() + x.abs());
        let formulas: [(String, Formula); 8] = [
            (table("q_sample"), &q_sample),
            (table("posterior_mean"), &posterior),
            (table("predict_start_from_noise"), &start_from_noise),
            (table("predict_noise_from_start"), &noise_from_start),
            (table("predict_v"), &v),
            (table("predict_start_from_v"), &start_from_v),
            (format!("diffusers/{schedule}/add_noise"), &q_sample),
            (format!("diffusers/{schedule}/get_velocity"), &v),
        ];
        for (name, formula) in formulas {
            for (i, expected) in library.read(&name).into_iter().enumerate() {
                let (found, size) = formula(t[i / image], [x0[i], noise[i], x_t[i]]);
                // The file holds f32: half an ulp.
                let bound = f64::from(f32::EPSILON) / 2.0 * expected.abs() + known * size;
                let error = (found - expected).abs();
                assert!(error <= bound, "{name}[{i}] at t = {}: {found} instead of {expected}", t[i / image]);
            }
        }
    }
    let all: BTreeSet<String> = library.file.names().into_iter().collect();
    assert_eq!(library.read, all, "a value that nobody reads proves nothing");
}
