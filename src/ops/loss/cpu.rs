use super::MseLoss;
use crate::device::cpu::Launch;
use crate::multiversion;

pub(super) fn mse_loss(op: &MseLoss, launch: &Launch<'_>) {
    let (out, pixels, t) = (launch.input::<f32>(0), launch.input::<u8>(1), launch.input::<u32>(2));
    let (table, clock) = (launch.input::<f32>(3), launch.input::<u32>(4));
    let numbers = op.batch.held.map(|_| launch.input::<u32>(5));
    let elements = op.batch.elements();
    let scale = op.scale();
    let (dout, loss) = (launch.output::<f32>(0), launch.output::<f32>(1));
    launch.pool().for_chunks2((dout, elements), (loss, 1), |j, dout, loss, scratch| {
        let row = 2 * t[j] as usize;
        let target = [table[row], table[row + 1]];
        let image = j * elements..(j + 1) * elements;
        let (out, pixels) = (&out[image], &pixels[op.batch.place(j, numbers)]);
        let mut sum = 0.0;
        op.batch.sample(clock, j).visit(pixels, scratch, |range, x_0, epsilon| {
            sum += residual(&mut dout[range.clone()], &out[range], x_0, epsilon, target, scale);
        });
        loss[0] = (sum / elements as f64) as f32;
        if !loss[0].is_finite() {
            dout.fill(f32::NAN);
        }
    });
}

const LANES: usize = 16;

multiversion! {
    /// dout = scale·(out − target) with target = a·x_0 + b·ε; returns Σ (out − target)².
    ///
    /// The squares of f32 are exact in f64; the sum runs in a fixed number of lanes.
    pub(super) fn residual(
        dout: &mut [f32], out: &[f32], x_0: &[f32], epsilon: &[f32], target: [f32; 2], scale: f32,
    ) -> f64 {
        let [a, b] = target;
        let mut sums = [0.0f64; LANES];
        let (douts, dout_rest) = dout.as_chunks_mut::<LANES>();
        let (outs, out_rest) = out.as_chunks::<LANES>();
        let (x_0s, x_0_rest) = x_0.as_chunks::<LANES>();
        let (epsilons, epsilon_rest) = epsilon.as_chunks::<LANES>();
        for (((dout, out), x_0), epsilon) in douts.iter_mut().zip(outs).zip(x_0s).zip(epsilons) {
            for lane in 0..LANES {
                let difference = out[lane] - (a * x_0[lane] + b * epsilon[lane]);
                dout[lane] = scale * difference;
                sums[lane] += f64::from(difference) * f64::from(difference);
            }
        }
        for (lane, (dout, out)) in dout_rest.iter_mut().zip(out_rest).enumerate() {
            let difference = out - (a * x_0_rest[lane] + b * epsilon_rest[lane]);
            *dout = scale * difference;
            sums[lane] += f64::from(difference) * f64::from(difference);
        }
        sums.iter().sum()
    }
}
