//! What may go wrong with cuDNN: engines that must not be used, a library that is missing, old, or fails.

use crate::build::Build;
use crate::convolution::{Operands, shape};
use crate::cudnn::open;
use crate::machine::{ALL, Setting, not_tested, run_cases};
use ddpm_dist::device::cuda::dnn::Dnn;
use ddpm_dist::device::cuda::{ConvolutionShape, CudaError, Gpu, Pass, Precision, WORKSPACE};

fn of(pass: Pass, precision: Precision) -> ConvolutionShape {
    shape(pass, [2, 6, 6, 8], [16, 3, 1], [1, 1], precision)
}

const FORWARD: Pass = Pass::Forward;
const WEIGHT: Pass = Pass::WeightGradient;

/// The machine's engines that are wrong (tests/cuda-sim/cudnn.cpp), each alone: the shape, and why it is refused.
const ENGINES: [(&[Setting], Pass, Precision, &str); 12] = [
    (&[("CUDA_SIM_CUDNN_ENGINES", "0")], FORWARD, Precision::Bf16, "engine 0: it gives other bits each time"),
    (&[("CUDA_SIM_CUDNN_ENGINES", "1")], FORWARD, Precision::Bf16, "engine 1: it is Winograd's"),
    (&[("CUDA_SIM_CUDNN_ENGINES", "1")], WEIGHT, Precision::F32, "engine 1: it is Winograd's"),
    (&[("CUDA_SIM_CUDNN_ENGINES", "2")], FORWARD, Precision::F32, "engine 2: it needs 1073741824 bytes of workspace"),
    (&[("CUDA_SIM_CUDNN_ENGINES", "3")], FORWARD, Precision::F32, "CUDNN_STATUS_NOT_SUPPORTED (3000)"),
    (&[("CUDA_SIM_CUDNN_ENGINES", "4")], FORWARD, Precision::F32, "engine 4: it rounds f32"),
    (&[("CUDA_SIM_CUDNN_ENGINES", "5")], WEIGHT, Precision::Bf16, "engine 5: it computes something else: element"),
    (&[("CUDA_SIM_CUDNN_ENGINES", "5")], WEIGHT, Precision::F32, "engine 5: it computes something else: element"),
    (&[("CUDA_SIM_CUDNN_ENGINES", "7")], FORWARD, Precision::F32, "engine 7: two runs give other bits"),
    (&[("CUDA_SIM_CUDNN_ENGINES", "9")], FORWARD, Precision::F32, "CUDNN_STATUS_EXECUTION_FAILED (5000)"),
    (&[("CUDA_SIM_CUDNN_ENGINES", "11")], FORWARD, Precision::F32, "engine 11: it computes something else: element"),
    (
        &[("CUDA_SIM_CUDNN_ENGINES", "10")],
        FORWARD,
        Precision::F32,
        "engine 10: it computes something else: element 0 is NaN",
    ),
];

#[test]
fn an_engine_that_must_not_be_used_is_refused() {
    let cases = ENGINES.map(|(settings, pass, precision, why)| (settings, (of(pass, precision), why)));
    run_cases("cudnn_faults::an_engine_that_must_not_be_used_is_refused", &ALL, &cases, |(shape, why)| {
        let (mut gpu, dnn) = open();
        let error = dnn.search(&mut gpu, shape, WORKSPACE).unwrap_err();
        assert!(matches!(error, CudaError::NoPlan { .. }), "{error}");
        assert!(error.to_string().contains(why), "{error}");
        assert!(error.to_string().contains(&shape.to_string()), "{error}");
    });
}

#[test]
fn engines_say_of_themselves_what_a_guess_needs() {
    // What engines 0 to 4 say is enough for a plan that nobody has timed.
    let cases = ENGINES.map(|(settings, pass, precision, why)| (settings, (of(pass, precision), why)));
    run_cases("cudnn_faults::engines_say_of_themselves_what_a_guess_needs", &ALL, &cases[..6], |(shape, why)| {
        let (_gpu, dnn) = open();
        let error = dnn.plan(shape, WORKSPACE).unwrap_err();
        assert!(error.to_string().contains(why), "{error}");
    });
}

#[test]
fn only_a_search_sees_that_an_engine_is_wrong() {
    let settings: &[Setting] = &[("CUDA_SIM_CUDNN_ENGINES", "5")];
    let test = "cudnn_faults::only_a_search_sees_that_an_engine_is_wrong";
    run_cases(test, &ALL, &[(settings, ())], |()| {
        let (gpu, dnn) = open();
        let shape = of(WEIGHT, Precision::F32);
        let operands = Operands::new(&shape);
        let plan = dnn.plan(&shape, WORKSPACE).unwrap();
        let found = operands.compute(&gpu, &plan).unwrap();
        assert!(operands.difference(&found, &plan).is_some(), "the machine's wrong engine is right");
    });
}

#[test]
fn a_search_passes_over_the_wrong_engine_that_is_fastest() {
    // It skips all images but one: nothing is faster.
    let cases: [(&[Setting], Precision); 2] = [
        (&[("CUDA_SIM_CUDNN_ENGINES", "5,8")], Precision::F32),
        (&[("CUDA_SIM_CUDNN_ENGINES", "5,8")], Precision::Bf16),
    ];
    let test = "cudnn_faults::a_search_passes_over_the_wrong_engine_that_is_fastest";
    run_cases(test, &ALL, &cases, |precision| {
        let (mut gpu, dnn) = open();
        let plan = dnn.search(&mut gpu, &of(WEIGHT, *precision), WORKSPACE).unwrap();
        assert_eq!(plan.choice().engine.engine, 8);
    });
}

#[test]
fn a_failure_in_each_phase_is_told() {
    let cases: [(&[Setting], &str); 3] = [
        (&[("CUDA_SIM_CUDNN_FAIL", "create")], "create"),
        (&[("CUDA_SIM_CUDNN_FAIL", "finalize")], "finalize"),
        (&[("CUDA_SIM_CUDNN_FAIL", "execute")], "execute"),
    ];
    run_cases("cudnn_faults::a_failure_in_each_phase_is_told", &ALL, &cases, |phase| {
        let mut gpu = Gpu::without_kernels(0).unwrap();
        let shape = of(FORWARD, Precision::Bf16);
        let opened = Dnn::open(&gpu);
        let error = match *phase {
            "create" => opened.err().unwrap(),
            "finalize" => opened.unwrap().plan(&shape, WORKSPACE).unwrap_err(),
            _ => {
                let dnn = opened.unwrap();
                let error = dnn.search(&mut gpu, &shape, WORKSPACE).unwrap_err();
                assert!(error.to_string().contains("engine 8: cuDNN 9.10.2 cannot run the convolution"), "{error}");
                let plan = dnn.plan(&shape, WORKSPACE).unwrap();
                Operands::new(&shape).compute(&gpu, &plan).unwrap_err()
            }
        };
        assert!(matches!(error, CudaError::Library { .. }), "{error:?}");
        let expected = match *phase {
            "create" => "cuDNN 9.10.2 cannot begin: CUDNN_STATUS_NOT_INITIALIZED (1001); the library cannot begin",
            "finalize" => {
                "cuDNN 9.10.2 cannot finalize the convolution descriptor: CUDNN_STATUS_INTERNAL_ERROR (4000); nothing can be finalized"
            }
            _ => {
                "cuDNN 9.10.2 cannot run the convolution of 2×6×6×8 with 16 filters of 3×3, stride 1, padding 1 and 1, bf16 by engine 4: \
                 CUDNN_STATUS_EXECUTION_FAILED (5000); the engine does not run"
            }
        };
        assert_eq!(error.to_string(), expected);
    });
}

#[test]
fn a_library_of_another_version_is_refused_by_its_name() {
    let cases: [(&[Setting], &str); 2] =
        [(&[("CUDA_SIM_CUDNN_VERSION", "8907")], "8.9.7"), (&[("CUDA_SIM_CUDNN_VERSION", "100000")], "10.0.0")];
    run_cases("cudnn_faults::a_library_of_another_version_is_refused_by_its_name", &ALL, &cases, |version| {
        let error = Dnn::open(&Gpu::without_kernels(0).unwrap()).err().unwrap();
        assert!(matches!(error, CudaError::WrongLibrary { .. }), "{error:?}");
        let text = error.to_string();
        assert!(text.starts_with(&format!("this is cuDNN {version}, and 9.0 or a later 9 is needed")), "{text}");
        assert!(text.contains("`pip install nvidia-cudnn-cu13`"), "{text}");
    });
}

#[test]
fn a_machine_without_cudnn_is_told_what_to_do() {
    let test = "cudnn_faults::a_machine_without_cudnn_is_told_what_to_do";
    run_cases(test, &[Build::BareDriver], &[(&[], ())], |()| {
        match Dnn::open(&Gpu::without_kernels(0).unwrap()).err() {
            Some(error @ CudaError::NoLibrary { .. }) => {
                let text = error.to_string();
                assert!(text.contains("cuDNN 9") && text.contains("libcudnn.so.9"), "{text}");
                assert!(text.contains("LD_LIBRARY_PATH") && text.contains("pip install nvidia-cudnn-cu13"), "{text}");
            }
            _ => not_tested("a machine without cuDNN: this one has it"),
        }
    });
}
