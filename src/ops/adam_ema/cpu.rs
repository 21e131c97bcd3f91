use super::AdamEma;
use crate::device::cpu::Launch;
use crate::multiversion;
use crate::ops::cast::cast;

/// Pieces that the buffers are cut into for the threads.
const PIECES: usize = 512;

/// The same range of all buffers.
#[derive(Default)]
struct Piece<'a> {
    weights: &'a mut [f32],
    moment1: &'a mut [f32],
    moment2: &'a mut [f32],
    ema: &'a mut [f32],
    gradients: &'a [f32],
}

pub(super) fn adam_ema(op: &AdamEma, launch: &Launch<'_>) {
    let norm = launch.input::<f32>(1);
    if norm[1] == 0.0 {
        return;
    }
    let update = Update::new(launch.input::<f32>(2), norm[0], op.decoupled);
    let mut gradients = launch.input::<f32>(0);
    let [all, mut moment1, mut moment2, mut ema] = [0, 1, 2, 3].map(|i| launch.output::<f32>(i));
    let mut weights = &mut all[..];
    let len = gradients.len().div_ceil(PIECES).next_multiple_of(16);
    let mut pieces: [Piece<'_>; PIECES] = std::array::from_fn(|_| {
        let len = len.min(gradients.len());
        Piece {
            weights: weights.split_off_mut(..len).unwrap_or_default(),
            moment1: moment1.split_off_mut(..len).unwrap_or_default(),
            moment2: moment2.split_off_mut(..len).unwrap_or_default(),
            ema: ema.split_off_mut(..len).unwrap_or_default(),
            gradients: gradients.split_off(..len).unwrap_or_default(),
        }
    });
    launch.pool().for_chunks(&mut pieces, 1, |_, piece, _| {
        let Piece { weights, moment1, moment2, ema, gradients } = &mut piece[0];
        apply(weights, moment1, moment2, ema, gradients, update);
    });
    if op.has_copy {
        cast(launch.pool(), all, launch.output(4));
    }
}

/// Factors that are the same for all parameters.
#[derive(Clone, Copy)]
struct Update {
    /// Of the gradient.
    clip: f32,
    /// Of w, added to the gradient.
    l2: f32,
    /// Of w, taken from w.
    decay: f32,
    /// 1−β1 and 1−β2.
    rates: [f32; 2],
    /// 1/√bc2.
    root: f32,
    eps: f32,
    /// lr/bc1.
    step: f32,
    /// 1−decay of the average.
    ema_rate: f32,
}

impl Update {
    fn new(scalars: &[f32], norm: f32, decoupled: bool) -> Update {
        let scalar = |i: usize| f64::from(scalars[i]);
        let (lr, weight_decay, max_grad_norm) = (scalar(0), scalar(4), scalar(7));
        let clip = if max_grad_norm > 0.0 { (max_grad_norm / (f64::from(norm) + 1e-6)).min(1.0) } else { 1.0 };
        let (l2, decay) = if decoupled { (0.0, lr * weight_decay) } else { (weight_decay, 0.0) };
        Update {
            clip: clip as f32,
            l2: l2 as f32,
            decay: decay as f32,
            rates: [scalars[1], scalars[2]],
            root: (1.0 / scalar(6).sqrt()) as f32,
            eps: scalars[3],
            step: (lr / scalar(5)) as f32,
            ema_rate: scalars[8],
        }
    }
}

multiversion! {
    fn apply(weights: &mut [f32], moment1: &mut [f32], moment2: &mut [f32], ema: &mut [f32], gradients: &[f32], u: Update) {
        let state = weights.iter_mut().zip(moment1).zip(moment2).zip(ema);
        for ((((weight, moment1), moment2), ema), gradient) in state.zip(gradients) {
            let w = *weight;
            let g = u.clip * gradient + u.l2 * w;
            let m = *moment1 + u.rates[0] * (g - *moment1);
            // A square past f32 must not make v infinite for good.
            let v = *moment2 + u.rates[1] * ((g * g).min(f32::MAX) - *moment2);
            let new = w - (u.decay * w + u.step * m / (v.sqrt() * u.root + u.eps));
            *moment1 = m;
            *moment2 = v;
            *weight = new;
            *ema += u.ema_rate * (new - *ema);
        }
    }
}
