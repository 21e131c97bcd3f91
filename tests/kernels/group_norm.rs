//! Group normalisation and its gradient, in one pass and in two.

use crate::cpu::on_cpu;
use crate::machine::{Buffer, run_with};
use crate::values::{bytes_of, bytes_of_f32, bytes_of_u32, f32_of, normals, rounded};
use ddpm_dist::device::cuda::{Argument, Launch, Precision};
use ddpm_dist::ops::group_norm::cuda::{self, Passes};
use ddpm_dist::ops::group_norm::{Dropout, GroupNorm, GroupNormGradient, Timestep};
use std::ops::Range;

const BOTH: [Precision; 2] = [Precision::F32, Precision::Bf16];

/// N, H, W; channels of the sources; groups.
type Shape = ([usize; 3], [usize; 2], usize);

/// Each kind of norm in the models for 32² and 256², with an eighth of the groups: 4, 8 and 16 channels a group from one source; 12, 16, 24
/// and 32 from two, of which those of 12 and 24 have channels of both.
const OF_MODELS: [Shape; 7] = [
    ([1, 32, 32], [16, 0], 4),
    ([2, 16, 16], [32, 0], 4),
    ([1, 8, 8], [64, 0], 4),
    ([2, 8, 8], [32, 16], 4),
    ([3, 4, 4], [32, 32], 4),
    ([1, 8, 8], [64, 32], 4),
    ([1, 4, 4], [64, 64], 4),
];

/// More images than a thread sums; groups of one channel and of three; three packs a pixel; channels that no pack divides; one pixel; more channels than a tile.
const ODD: [Shape; 10] = [
    ([19, 2, 2], [8, 0], 2),
    ([2, 5, 3], [6, 0], 6),
    ([1, 5, 3], [9, 6], 5),
    ([2, 5, 3], [24, 0], 3),
    ([1, 13, 11], [24, 0], 3),
    ([2, 5, 3], [12, 20], 4),
    ([3, 1, 1], [8, 0], 2),
    ([2, 1, 1], [4, 0], 4),
    ([1, 7, 9], [100, 0], 1),
    ([1, 2, 2], [264, 8], 34),
];

/// What the timestep does.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Use {
    Nothing,
    Add,
    ScaleShift,
}

/// What stands around a norm, and which gradients are added to.
#[derive(Clone, Copy, Debug)]
struct Around {
    silu: bool,
    timestep: Use,
    dropout: Option<f32>,
    /// dx1, dx2, dγ and dβ.
    adds: [bool; 3],
}

const BARE: Around = Around { silu: false, timestep: Use::Nothing, dropout: None, adds: [true, false, false] };
const SILU: Around = Around { silu: true, ..BARE };
const ALL: Around = Around { silu: true, timestep: Use::Add, dropout: Some(0.3), adds: [false, true, true] };
const DROPOUT: Around = Around { dropout: Some(0.1), adds: [true, true, false], ..BARE };
const TIMESTEP: Around = Around { timestep: Use::Add, adds: [false; 3], ..SILU };
const SCALE_SHIFT: Around = Around { timestep: Use::ScaleShift, ..ALL };
const SCALE_SHIFT_ALONE: Around = Around { timestep: Use::ScaleShift, ..BARE };

/// Columns of the timestep matrix before those of the norm, and after.
const OTHER_COLUMNS: [usize; 2] = [3, 2];

fn norm((size, channels, groups): Shape, around: Around) -> GroupNorm {
    let total = channels[0] + channels[1];
    let [offset, after] = OTHER_COLUMNS;
    GroupNorm {
        size,
        channels,
        groups,
        eps: 1e-6,
        silu: around.silu,
        timestep: match around.timestep {
            Use::Nothing => None,
            Use::Add => Some(Timestep::Add { offset, total: offset + total + after }),
            Use::ScaleShift => Some(Timestep::ScaleShift { offset, total: offset + 2 * total + after }),
        },
        dropout: around.dropout.map(|probability| Dropout { probability, seed: 0x1234_5678_9abc, layer: 7 }),
    }
}

/// A tensor as a device holds it, the CPU, and as numbers: all the same.
#[derive(Clone)]
struct Tensor {
    device: Vec<u8>,
    values: Vec<f32>,
}

impl Tensor {
    fn new(values: Vec<f32>, precision: Precision) -> Tensor {
        let values: Vec<f32> = values.into_iter().map(|x| rounded(x, precision)).collect();
        Tensor { device: bytes_of(&values, precision), values }
    }

    fn cpu(&self) -> Vec<u8> {
        bytes_of_f32(&self.values)
    }
}

/// A norm with its inputs.
struct Case {
    op: GroupNorm,
    precision: Precision,
    /// Sources, γ, β, and the timestep matrix if there is one.
    inputs: Vec<Tensor>,
}

impl Case {
    fn new(op: GroupNorm, precision: Precision) -> Case {
        let [n, h, w] = op.size;
        let total = op.channels[0] + op.channels[1];
        let mut inputs = vec![];
        for (s, &c) in op.channels.iter().enumerate().filter(|(_, c)| **c > 0) {
            // Channels of unlike size and mean.
            let mut x = normals(s as u64, n * h * w * c);
            x.iter_mut().enumerate().for_each(|(i, x)| *x = *x * (0.5 + (i % c % 7) as f32 / 8.0) + (i % c % 3) as f32);
            inputs.push(Tensor::new(x, precision));
        }
        inputs.push(Tensor::new(normals(2, total).iter().map(|g| 1.0 + 0.3 * g).collect(), Precision::F32));
        inputs.push(Tensor::new(normals(3, total), Precision::F32));
        let columns = match op.timestep {
            Some(Timestep::Add { total, .. } | Timestep::ScaleShift { total, .. }) => total,
            None => 0,
        };
        inputs.extend(op.timestep.map(|_| Tensor::new(normals(4, n * columns), precision)));
        Case { op, precision, inputs }
    }

    fn clock(&self) -> Option<Vec<u8>> {
        self.op.dropout.map(|_| bytes_of_u32(&[1_000_003, u32::MAX, 99, 99]))
    }

    fn on_device(&self) -> Vec<Vec<u8>> {
        self.inputs.iter().map(|tensor| tensor.device.clone()).chain(self.clock()).collect()
    }

    fn on_host(&self) -> Vec<Vec<u8>> {
        self.inputs.iter().map(Tensor::cpu).chain(self.clock()).collect()
    }

    fn elements(&self) -> usize {
        self.op.size.iter().product::<usize>() * (self.op.channels[0] + self.op.channels[1])
    }

    fn pixels(&self) -> usize {
        self.op.size[1] * self.op.size[2]
    }

    /// One pass, and two with a last chunk that is smaller.
    fn passes(&self) -> [Passes; 2] {
        [Passes::One, Passes::Two { chunk: self.pixels().div_ceil(3) }]
    }

    /// The norm's own columns of the timestep matrix, and all.
    fn columns(&self) -> Option<(Range<usize>, usize)> {
        let channels = self.op.channels[0] + self.op.channels[1];
        self.op.timestep.map(|timestep| match timestep {
            Timestep::Add { offset, total } => (offset..offset + channels, total),
            Timestep::ScaleShift { offset, total } => (offset..offset + 2 * channels, total),
        })
    }

    /// The largest 1 + scale.
    fn largest_factor(&self) -> f32 {
        let (Some(Timestep::ScaleShift { .. }), Some((own, total))) = (self.op.timestep, self.columns()) else {
            return 1.0;
        };
        let scales = own.start..own.start + own.len() / 2;
        let rows = self.inputs.last().unwrap().values.chunks(total);
        rows.flat_map(|row| &row[scales.clone()]).fold(0.0, |largest, scale| largest.max((1.0 + scale).abs()))
    }

    fn name(&self, what: &str, passes: Passes) -> String {
        format!("{what} of {:?}, {:?}, {passes:?}", self.op, self.precision)
    }

    /// Mean and rstd of the groups by the formulas, in f64.
    fn exact_statistics(&self) -> [Vec<f32>; 2] {
        let GroupNorm { size: [n, ..], channels: [c1, c2], groups, eps, timestep, .. } = self.op;
        let (pixels, total) = (self.pixels(), c1 + c2);
        let u = |image: usize, pixel: usize, c: usize| {
            let [source, channels, own] = if c < c1 { [0, c1, c] } else { [1, c2, c - c1] };
            let x = self.inputs[source].values[(image * pixels + pixel) * channels + own];
            let term = match timestep {
                Some(Timestep::Add { offset, total }) => self.inputs.last().unwrap().values[image * total + offset + c],
                Some(Timestep::ScaleShift { .. }) | None => 0.0,
            };
            f64::from(x) + f64::from(term)
        };
        let of_group = |group: usize| {
            let (image, size) = (group / groups, total / groups);
            let first = group % groups * size;
            let members: Vec<f64> = (0..pixels * size).map(|i| u(image, i / size, first + i % size)).collect();
            let mean = members.iter().sum::<f64>() / members.len() as f64;
            let variance = members.iter().map(|u| (u - mean).powi(2)).sum::<f64>() / members.len() as f64;
            (mean as f32, (1.0 / (variance + eps).sqrt()) as f32)
        };
        let (means, rstds) = (0..n * groups).map(of_group).unzip();
        [means, rstds]
    }

    fn check_statistics(&self, found: &[u8], passes: Passes) {
        let found = f32_of(found, Precision::F32);
        let [means, rstds] = self.exact_statistics();
        // Channels' means are f32, and are added up in f64.
        close(&self.name("mean", passes), &every_second(&found, 0), &means, Precision::F32, 1.0);
        // Half the relative error of the variance, a sum of up to 16 + 8 squares one after another.
        close(&self.name("rstd", passes), &every_second(&found, 1), &rstds, Precision::F32, 12.0);
    }

    /// y and the statistics, from the kernels.
    fn forward(&self, passes: Passes) -> Vec<Vec<u8>> {
        let inputs: Vec<Buffer> = self.on_device().into_iter().map(Buffer::Input).collect();
        let statistics = 8 * self.op.size[0] * self.op.groups;
        let outputs = [self.elements() * self.precision.bytes(), statistics].map(Buffer::Output).to_vec();
        let workspace = Buffer::Output(cuda::workspace(&self.op, passes));
        run_all(&cuda::launches_in(&self.op, self.precision, passes), &inputs, outputs, workspace)
    }

    fn check_forward(&self, passes: Passes) {
        let expected = on_cpu(self.op.clone(), &self.on_host(), &[]);
        let found = self.forward(passes);

        let [y, expected_y] = [f32_of(&found[0], self.precision), f32_of(&expected[0], Precision::F32)];
        assert_eq!(
            y.iter().map(|y| *y == 0.0).collect::<Vec<_>>(),
            expected_y.iter().map(|y| *y == 0.0).collect::<Vec<_>>(),
            "{}",
            self.name("dropped elements", passes)
        );
        self.check_statistics(&found[1], passes);
        // x - mean, and gamma, rstd, their product, the sum with beta, SiLU: some roundings of numbers of y's size each.
        close(&self.name("y", passes), &y, &expected_y, self.precision, 32.0);
    }

    fn check_gradient(&self, around: Around, passes: Passes) {
        let sources = self.op.channels.iter().filter(|c| **c > 0).count();
        let dy = Tensor::new(normals(5, self.elements()), self.precision);
        let statistics = on_cpu(self.op.clone(), &self.on_host(), &[]).remove(1);
        let with = |dy: &[u8], inputs: Vec<Vec<u8>>| -> Vec<Vec<u8>> {
            [dy.to_vec()].into_iter().chain(inputs).chain([statistics.clone()]).collect()
        };
        let op = GroupNormGradient { norm: self.op.clone() };
        let expected = on_cpu(op.clone(), &with(&dy.cpu(), self.on_host()), &[]);

        // The gradients of all inputs but the clock: dx1, (dx2), dγ, dβ, (timestep).
        let adds: Vec<bool> = (0..self.inputs.len())
            .map(|i| if i < sources { around.adds[i] } else { around.adds[2] && i < sources + 2 })
            .collect();
        let is_columns = |i: usize| i == sources + 2;
        let precision_of = |i: usize| if i == sources || i == sources + 1 { Precision::F32 } else { self.precision };
        let before: Vec<Tensor> = (0..adds.len())
            .map(|i| Tensor::new(normals(10 + i as u64, self.inputs[i].values.len()), precision_of(i)))
            .collect();
        let outputs = (0..adds.len())
            .map(|i| match adds[i] || is_columns(i) {
                true => Buffer::Updated(before[i].device.clone()),
                false => Buffer::Output(before[i].device.len()),
            })
            .collect();
        let updates = adds.iter().enumerate().map(|(i, adds)| u32::from(*adds) << i).sum();
        let inputs: Vec<Buffer> = with(&dy.device, self.on_device()).into_iter().map(Buffer::Input).collect();
        let workspace = Buffer::Updated(vec![0xFF; cuda::gradient_workspace(&op, passes)]);
        let launches = cuda::gradient_launches_in(&op, self.precision, updates, passes);
        let found = run_all(&launches, &inputs, outputs, workspace);

        let rstd = every_second(&f32_of(&statistics, Precision::F32), 1);
        let keep = 1.0 - around.dropout.unwrap_or(0.0);
        // The largest term of dx is γ·rstd·dz, times 1 + scale.
        let dz = 1.1 * largest(&dy.values) / keep;
        let term = largest(&self.inputs[sources].values) * largest(&rstd) * self.largest_factor() * dz;
        let (images, pixels) = (self.op.size[0] as f32, self.pixels() as f32);
        for (i, expected) in expected.iter().enumerate() {
            let name = ["dx1", "dx2", "d_gamma", "d_beta", "d_timestep"][i + usize::from(sources == 1 && i > 0)];
            let name = self.name(name, passes);
            let mut exact = f32_of(expected, Precision::F32);
            let found = f32_of(&found[i], precision_of(i));
            let own = self.columns().filter(|_| is_columns(i));
            let is_own = |k: usize| own.as_ref().is_none_or(|(own, total)| own.contains(&(k % total)));
            for (k, (exact, before)) in exact.iter_mut().zip(&before[i].values).enumerate() {
                if !is_own(k) {
                    // Columns of other layers stay as they were.
                    *exact = *before;
                } else if adds[i] {
                    *exact += before;
                }
            }
            // Sums over so many terms, each with roundings of its size: those of a sum of n terms of either sign are √n of one term's.
            let size = match i {
                _ if is_columns(i) && around.timestep == Use::Add => term * pixels.sqrt(),
                _ if is_columns(i) => largest(&exact).max(dz * pixels.sqrt()),
                i if i < sources => term,
                _ => largest(&exact).max(largest(&dy.values) * (images * pixels).sqrt()),
            };
            close_to(&name, &found, &exact, precision_of(i), 32.0, size);
        }
    }
}

/// The launches one after another; gives the outputs. A launch reads what an earlier one has written.
fn run_all(launches: &[Launch], inputs: &[Buffer], mut outputs: Vec<Buffer>, mut workspace: Buffer) -> Vec<Vec<u8>> {
    for launch in launches {
        let mut written = run_with(launch, inputs, &outputs, &workspace).into_iter();
        for argument in &launch.arguments {
            let buffer = match argument {
                Argument::Output(place) => &mut outputs[*place],
                Argument::Scratch => &mut workspace,
                _ => continue,
            };
            match buffer {
                Buffer::Input(_) => {}
                Buffer::Updated(content) if matches!(argument, Argument::Scratch) => *content = written.next().unwrap(),
                Buffer::Output(_) | Buffer::Updated(_) => *buffer = Buffer::Input(written.next().unwrap()),
            }
        }
        assert!(written.next().is_none());
    }
    let content = |buffer: Buffer| match buffer {
        Buffer::Input(content) => content,
        Buffer::Output(_) | Buffer::Updated(_) => panic!("an output that no launch writes"),
    };
    outputs.into_iter().map(content).collect()
}

fn every_second(values: &[f32], from: usize) -> Vec<f32> {
    values.iter().skip(from).step_by(2).copied().collect()
}

fn largest(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |largest, x| largest.max(x.abs()))
}

/// So many roundings of f32 of numbers of the largest one's size, and one to the precision.
#[track_caller]
fn close(name: &str, found: &[f32], exact: &[f32], precision: Precision, roundings: f32) {
    close_to(name, found, exact, precision, roundings, largest(exact));
}

#[track_caller]
fn close_to(name: &str, found: &[f32], exact: &[f32], precision: Precision, roundings: f32, size: f32) {
    let last = match precision {
        Precision::F32 => f32::EPSILON / 2.0,
        Precision::Bf16 => 1.0 / 256.0,
    };
    assert_eq!(found.len(), exact.len(), "{name}");
    for (i, (found, exact)) in found.iter().zip(exact).enumerate() {
        let tolerance = last * exact.abs() + roundings * f32::EPSILON / 2.0 * size;
        let off = (found - exact).abs();
        assert!(
            off <= tolerance,
            "{name}: element {i} is {found}, expected {exact}, {off:e} off and not {tolerance:e}"
        );
    }
}

fn check(shapes: &[Shape], around: Around) {
    for &shape in shapes {
        for precision in BOTH {
            let case = Case::new(norm(shape, around), precision);
            for passes in case.passes() {
                case.check_forward(passes);
                case.check_gradient(around, passes);
            }
        }
    }
}

#[test]
fn norms_of_the_models_are_those_of_the_cpu() {
    check(&OF_MODELS, SILU);
}

#[test]
fn with_timestep_term_and_dropout_too() {
    check(&OF_MODELS, ALL);
}

#[test]
fn with_scale_and_shift_by_the_timestep_too() {
    check(&OF_MODELS, SCALE_SHIFT);
}

#[test]
fn odd_norms_are_those_of_the_cpu() {
    check(&ODD, ALL);
    check(&ODD, SCALE_SHIFT);
    check(&ODD, BARE);
}

#[test]
fn each_of_what_stands_around_a_norm_alone() {
    for around in [DROPOUT, TIMESTEP, SCALE_SHIFT_ALONE, SILU] {
        check(&[([2, 5, 3], [12, 20], 4), ([2, 4, 4], [16, 16], 4)], around);
    }
}

/// Moments about zero in f32 would have a variance that is off by a tenth.
#[test]
fn a_mean_far_from_zero_costs_no_digits() {
    let mut case = Case::new(norm(([1, 16, 16], [8, 0], 2), BARE), Precision::F32);
    case.inputs[0] = Tensor::new(normals(1, 256 * 8).iter().map(|x| x + 1000.0).collect(), Precision::F32);
    for passes in case.passes() {
        let found = case.forward(passes);
        case.check_statistics(&found[1], passes);
    }
}

/// Shapes of cifar10.toml and lsun256.toml: groups are 32.
#[test]
fn norms_of_32_pixels_are_read_once_and_those_of_256_twice() {
    let of = |pixels, channels, precision| {
        let norm = norm(([128, pixels, pixels], channels, 32), ALL);
        let gradient = GroupNormGradient { norm: norm.clone() };
        let launches = [cuda::launches(&norm, precision), cuda::gradient_launches(&gradient, precision, 0)].concat();
        // Shared memory of a block, and blocks along y and z, as far as an A100 has them.
        assert!(
            launches.iter().all(|launch| launch.shared <= 163 << 10 && launch.grid[1].max(launch.grid[2]) < 1 << 16)
        );
        [cuda::forward_passes(&norm, precision), cuda::backward_passes(&gradient, precision)]
    };
    for precision in BOTH {
        for pixels in [32, 16, 8, 4] {
            for channels in [[128, 0], [256, 0], [128, 128], [256, 128], [256, 256]] {
                assert_eq!(of(pixels, channels, precision), [Passes::One; 2], "{pixels}², {channels:?}, {precision:?}");
            }
        }
        for channels in [[512, 0], [512, 256], [512, 512]] {
            assert_eq!(of(16, channels, precision), [Passes::One; 2], "{channels:?}, {precision:?}");
        }
        for (pixels, channels) in [(256, [128, 0]), (128, [128, 128]), (128, [256, 128])] {
            let two = of(pixels, channels, precision);
            assert!(two.iter().all(|passes| matches!(passes, Passes::Two { .. })), "{pixels}², {channels:?}: {two:?}");
        }
    }
    assert_eq!(of(64, [256, 0], Precision::Bf16)[0], Passes::One);
}
