//! Convolutions of cuDNN: every pass against its definition, and choices that are written down and found again.

use crate::convolution::{Operands, PASSES, shape};
use crate::machine::{ALL, run, run_cases};
use ddpm_dist::device::cuda::dnn::{ConvolutionPlan, Dnn, Knob, PlanChoice, Rest};
use ddpm_dist::device::cuda::{ConvolutionShape, CudaError, Gpu, Pass, Precision, WORKSPACE};

pub const BOTH: [Precision; 2] = [Precision::F32, Precision::Bf16];

pub fn open() -> (Gpu, Dnn) {
    let gpu = Gpu::without_kernels(0).unwrap_or_else(|error| panic!("{error}"));
    let dnn = Dnn::open(&gpu).unwrap_or_else(|error| panic!("{error}"));
    (gpu, dnn)
}

/// The model's convolutions scaled down: stride 1 and 2, the first and the last, a 1×1 one, and pictures that are not square.
const SIZES: [([usize; 4], [usize; 3], [usize; 2]); 6] = [
    ([2, 8, 8, 16], [24, 3, 1], [1, 1]),
    ([2, 8, 8, 16], [16, 3, 2], [0, 1]),
    ([3, 6, 10, 8], [8, 3, 2], [0, 1]),
    ([2, 5, 7, 3], [16, 3, 1], [1, 1]),
    ([1, 4, 4, 13], [3, 3, 1], [1, 1]),
    ([3, 4, 6, 24], [13, 1, 1], [0, 0]),
];

/// All that is asked of a pass: bias and residual, or what is added to.
fn variants(shape: ConvolutionShape) -> Vec<ConvolutionShape> {
    match shape.pass {
        Pass::Forward => [[false, false], [true, false], [true, true]]
            .map(|[has_bias, has_residual]| ConvolutionShape { has_bias, has_residual, ..shape })
            .into(),
        _ => [false, true].map(|adds| ConvolutionShape { adds, ..shape }).into(),
    }
}

fn all_shapes() -> Vec<ConvolutionShape> {
    let of_size = |(x, filters, padding)| {
        let of_pass = move |pass| BOTH.map(|precision| shape(pass, x, filters, padding, precision));
        PASSES.into_iter().flat_map(of_pass)
    };
    SIZES.into_iter().flat_map(of_size).flat_map(variants).collect()
}

#[track_caller]
fn must_be_right(gpu: &Gpu, shape: &ConvolutionShape, plan: &ConvolutionPlan) {
    let operands = Operands::new(shape);
    let found = operands.compute(gpu, plan).unwrap_or_else(|error| panic!("{error}"));
    if let Some(difference) = operands.difference(&found, plan) {
        panic!("engine {}: {difference}", plan.choice().engine.engine);
    }
}

#[test]
fn every_pass_is_what_it_is_defined_to_be() {
    run("cudnn::every_pass_is_what_it_is_defined_to_be", || {
        let (gpu, dnn) = open();
        for shape in all_shapes() {
            let plan = dnn.plan(&shape, WORKSPACE).unwrap_or_else(|error| panic!("{error}"));
            must_be_right(&gpu, &shape, &plan);
        }
    });
}

#[test]
fn a_search_finds_a_plan_that_is_right() {
    run("cudnn::a_search_finds_a_plan_that_is_right", || {
        let (mut gpu, dnn) = open();
        for shape in all_shapes() {
            let plan = dnn.search(&mut gpu, &shape, WORKSPACE).unwrap_or_else(|error| panic!("{error}"));
            assert!(plan.time().is_some() && plan.workspace() <= WORKSPACE, "{shape}");
            must_be_right(&gpu, &shape, &plan);
        }
    });
}

#[test]
fn what_cudnn_does_not_do_is_left_to_kernels() {
    let no = |feature| [("CUDA_SIM_CUDNN_WITHOUT", feature)];
    let (fusion, beta, narrow, none) = (no("fusion"), no("beta"), no("narrow"), no("beta,narrow"));
    let of = |pass, precision| shape(pass, [2, 6, 6, 8], [16, 3, 1], [1, 1], precision);
    let forward = |precision| ConvolutionShape { has_bias: true, has_residual: true, ..of(Pass::Forward, precision) };
    let added = |pass, precision| ConvolutionShape { adds: true, ..of(pass, precision) };
    let (f32, bf16) = (Precision::F32, Precision::Bf16);
    let (input, weight) = (Pass::InputGradient, Pass::WeightGradient);
    let cases: [(&[_], _); 13] = [
        (&[], (forward(bf16), Rest::Nothing)),
        (&[], (forward(f32), Rest::Nothing)),
        // An engine that writes f32 is slow.
        (&[], (of(weight, bf16), Rest::Gradient(bf16))),
        (&[], (added(weight, bf16), Rest::Gradient(bf16))),
        (&fusion, (forward(bf16), Rest::Bias)),
        (&fusion, (forward(f32), Rest::Bias)),
        (&fusion, (of(Pass::Forward, bf16), Rest::Nothing)),
        (&beta, (added(input, bf16), Rest::Gradient(bf16))),
        (&beta, (added(input, f32), Rest::Gradient(f32))),
        (&beta, (added(weight, f32), Rest::Gradient(f32))),
        (&narrow, (of(weight, bf16), Rest::Nothing)),
        (&narrow, (added(weight, f32), Rest::Nothing)),
        (&none, (added(weight, bf16), Rest::Gradient(f32))),
    ];
    let test = "cudnn::what_cudnn_does_not_do_is_left_to_kernels";
    run_cases(test, &ALL, &cases, |(shape, rest)| {
        let (mut gpu, dnn) = open();
        let first = dnn.plan(shape, WORKSPACE).unwrap_or_else(|error| panic!("{error}"));
        must_be_right(&gpu, shape, &first);
        let fastest = dnn.search(&mut gpu, shape, WORKSPACE).unwrap_or_else(|error| panic!("{error}"));
        must_be_right(&gpu, shape, &fastest);
        // A real library may fuse and add where this machine does not.
        if std::env::var("DDPM_DIST_KERNELS").is_err() {
            assert_eq!(fastest.rest(), *rest, "{shape}");
        }
    });
}

#[test]
fn a_limit_of_the_workspace_holds() {
    run("cudnn::a_limit_of_the_workspace_holds", || {
        let (mut gpu, dnn) = open();
        for pass in PASSES {
            let shape = shape(pass, [2, 6, 6, 8], [16, 3, 1], [1, 1], Precision::F32);
            assert_eq!(dnn.plan(&shape, 0).unwrap_or_else(|error| panic!("{error}")).workspace(), 0);
            let plan = dnn.search(&mut gpu, &shape, 0).unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(plan.workspace(), 0);
            must_be_right(&gpu, &shape, &plan);
        }
    });
}

#[test]
fn a_gradient_that_stands_in_the_workspace_counts() {
    let (test, without) =
        ("cudnn::a_gradient_that_stands_in_the_workspace_counts", [("CUDA_SIM_CUDNN_WITHOUT", "beta")]);
    run_cases(test, &ALL, &[(&without[..], ())], |()| {
        let (mut gpu, dnn) = open();
        let shape = shape(Pass::InputGradient, [2, 6, 6, 8], [16, 3, 1], [1, 1], Precision::F32);
        let shape = ConvolutionShape { adds: true, ..shape };
        let bytes = dnn.plan(&shape, WORKSPACE).unwrap().workspace();
        assert!(bytes >= 2 * 6 * 6 * 8 * 4, "{bytes}");
        let error = dnn.search(&mut gpu, &shape, 2 * 6 * 6 * 8 * 4 - 1).unwrap_err();
        assert!(error.to_string().contains("bytes of workspace, and may have 2303"), "{error}");
    });
}

fn some_shape() -> ConvolutionShape {
    shape(Pass::WeightGradient, [2, 6, 6, 8], [16, 3, 1], [1, 1], Precision::F32)
}

#[test]
fn a_choice_is_written_down_and_found_again() {
    run("cudnn::a_choice_is_written_down_and_found_again", || {
        let (mut gpu, dnn) = open();
        for shape in all_shapes() {
            let plan = dnn.plan(&shape, WORKSPACE).unwrap();
            let text = serde_json::to_string(plan.choice()).unwrap();
            let choice: PlanChoice = serde_json::from_str(&text).unwrap();
            assert_eq!(&choice, plan.choice());
            let again = dnn.plan_from_choice(&choice).unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(
                (again.choice(), again.workspace(), again.rest()),
                (plan.choice(), plan.workspace(), plan.rest())
            );
            let operands = Operands::new(&shape);
            let bits = |plan| operands.compute(&gpu, plan).unwrap().into_iter().map(f32::to_bits).collect::<Vec<u32>>();
            assert_eq!(bits(&again), bits(&plan), "{shape}");
        }
        let found = dnn.search(&mut gpu, &some_shape(), WORKSPACE).unwrap();
        assert_eq!(dnn.plan_from_choice(found.choice()).unwrap().choice(), found.choice());
    });
}

#[test]
fn a_choice_that_does_not_hold_here_is_refused() {
    run("cudnn::a_choice_that_does_not_hold_here_is_refused", || {
        let (_gpu, dnn) = open();
        let choice = dnn.plan(&some_shape(), WORKSPACE).unwrap().choice().clone();
        let said = |choice: &PlanChoice| dnn.plan_from_choice(choice).unwrap_err();
        let mut unknown = choice.clone();
        unknown.engine.engine = 100_000;
        let mut other_knobs = choice.clone();
        other_knobs.engine.knobs = vec![Knob { kind: 2, value: 1 << 40 }];
        for wrong in [unknown, other_knobs] {
            let error = said(&wrong);
            assert!(matches!(error, CudaError::NoPlan { .. }), "{error}");
            assert!(error.to_string().contains(&format!("engine {}", wrong.engine.engine)), "{error}");
        }
    });
}
