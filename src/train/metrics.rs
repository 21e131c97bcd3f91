//! What a step tells of itself.

/// What a step measured.
#[derive(Clone, Debug, PartialEq)]
pub struct Metrics {
    /// L_simple (eq. 14): mean over the batch.
    pub loss: f64,
    /// Mean loss of the samples whose t lies in each quarter of 0 … T−1, where there are any.
    pub quartiles: [Option<f64>; 4],
    /// Global norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Whether loss and gradients were finite; if not, the step changed nothing.
    pub finite: bool,
}

impl Metrics {
    /// Of all images of a batch, given as their losses and timesteps (of T) in the order of the batch, and the norm of their gradient.
    pub fn new(images: impl Iterator<Item = (f32, u32)>, timesteps: usize, norm: [f32; 2]) -> Metrics {
        let (mut all, mut number) = (0.0f64, 0usize);
        let mut sums = [(0.0f64, 0usize); 4];
        for (loss, t) in images {
            let loss = f64::from(loss);
            let (sum, count) = &mut sums[(4 * t as usize / timesteps).min(3)];
            *sum += loss;
            *count += 1;
            all += loss;
            number += 1;
        }
        let loss = all / number as f64;
        Metrics {
            loss,
            quartiles: sums.map(|(sum, count)| (count > 0).then(|| sum / count as f64)),
            grad_norm: f64::from(norm[0]),
            finite: norm[1] == 1.0 && loss.is_finite(),
        }
    }
}
