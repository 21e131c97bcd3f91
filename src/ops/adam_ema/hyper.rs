/// The numbers of one optimiser step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hyper {
    /// Learning rate, warm-up included.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to √v̂; above 0, or weights that no gradient ever reached become 0/0.
    pub eps: f64,
    /// Weight decay; 0 is none.
    pub weight_decay: f64,
    /// 1 − β1^t with t = 1 at the first update; see [`bias_correction`].
    pub bias_correction1: f64,
    /// 1 − β2^t.
    pub bias_correction2: f64,
    /// Norm to which gradients are clipped; 0 is no clipping.
    pub max_grad_norm: f64,
    /// Decay of the moving average; 0 makes the average equal to the weights.
    pub ema_decay: f64,
}

impl Hyper {
    /// Length of the array.
    pub const LEN: usize = 16;

    /// What the device reads: lr, 1−β1, 1−β2, eps, weight_decay, bias_correction1, bias_correction2, max_grad_norm, 1−ema_decay, and
    /// zeros.
    ///
    /// The decays are passed as what they are short of 1, for 1 − 0.9999 in f32 is off by 1.7e-4 of itself.
    pub fn to_array(&self) -> [f32; Hyper::LEN] {
        let mut array = [0.0; Hyper::LEN];
        let values = [
            self.lr,
            1.0 - self.beta1,
            1.0 - self.beta2,
            self.eps,
            self.weight_decay,
            self.bias_correction1,
            self.bias_correction2,
            self.max_grad_norm,
            1.0 - self.ema_decay,
        ];
        for (slot, value) in array.iter_mut().zip(values) {
            *slot = value as f32;
        }
        array
    }
}

/// 1 − β^step.
pub fn bias_correction(beta: f64, step: u64) -> f64 {
    -(step as f64 * beta.ln()).exp_m1()
}
