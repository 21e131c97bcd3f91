//! Initial parameters, as in the paper's code.

use crate::rng::{Kind, Stream};
use crate::tape::{ParamLayout, Part, Tape};
use std::collections::TryReserveError;

/// Variance scale of layers that should start as zero (the last of each residual branch, and the output).
const ZERO_SCALE: f64 = 1e-10;

/// All parameters of the UNet on `tape` as one flat buffer in the order of `layout`.
///
/// Weights are Xavier uniform: U(−a, a) with a = √(6·scale/(fan_in + fan_out)), scale 1 or 1e-10. Norms start as the identity, biases at
/// 0. The draw of a parameter depends on `seed` and its number in the trace, not on its place.
///
/// # Errors
/// No memory for them on the host: the sizes come from a config, and may be any.
pub fn initial_parameters(tape: &Tape, layout: &ParamLayout, seed: u64) -> Result<Vec<f32>, TryReserveError> {
    let mut flat = Vec::new();
    flat.try_reserve_exact(layout.len())?;
    flat.resize(layout.len(), 0.0);
    let parts = tape.params().iter().flat_map(|p| &p.parts);
    for (number, part) in parts.enumerate() {
        if let Some(placed) = layout.get(&part.name) {
            initialise(part, seed, number as u32, &mut flat[placed.range.clone()]);
        }
    }
    Ok(flat)
}

fn initialise(part: &Part, seed: u64, number: u32, out: &mut [f32]) {
    if part.name.ends_with("bias") {
        return;
    }
    let [rows, rest @ ..] = part.shape.dims() else { return };
    let Some((columns, taps)) = rest.split_last() else {
        return out.fill(1.0); // a norm's weight
    };
    let taps: usize = taps.iter().product();
    let starts_as_zero = ["conv2.weight", "to_out.0.weight"].iter().any(|end| part.name.ends_with(end))
        || part.name == "conv_out.weight";
    let scale = if starts_as_zero { ZERO_SCALE } else { 1.0 };
    let limit = (6.0 * scale / ((rows + columns) * taps) as f64).sqrt();
    let stream = Stream { seed, kind: Kind::Init, layer: number, sample: 0, step: 0 };
    for (element, value) in out.iter_mut().enumerate() {
        *value = (limit * (2.0 * f64::from(stream.uniform(element as u64)) - 1.0)) as f32;
    }
}
