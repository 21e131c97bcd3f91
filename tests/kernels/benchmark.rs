//! What the benchmark measures (benches/kernels): every kernel, with the arguments that it takes.

#[expect(dead_code, reason = "what is measured and said of a case, only the benchmark asks")]
#[path = "../../benches/kernels/cases/mod.rs"]
mod cases;

use crate::sim::kernels;
use ddpm_dist::device::cuda::Argument;
use std::collections::BTreeSet;

#[test]
fn every_kernel_is_measured_with_the_arguments_that_it_takes() {
    let kernels = kernels();
    let mut left: BTreeSet<&String> = kernels.keys().collect();
    assert!(left.len() > 50, "{left:?}");
    for case in cases::all() {
        for launch in &case.launches {
            let sizes = |argument: &Argument| match argument {
                Argument::Input(i) => case.inputs.get(*i).map(|_| 8),
                Argument::Output(i) => case.outputs.get(*i).map(|_| 8),
                Argument::Scratch => (case.scratch > 0).then_some(8),
                Argument::Null => Some(8),
                Argument::Value(bytes) => Some(bytes.len()),
            };
            let given: Option<Vec<usize>> = launch.arguments.iter().map(sizes).collect();
            assert!(given.is_some(), "{} {}: a buffer is missing for {launch:?}", case.name, case.shape);
            assert_eq!(given.as_ref(), kernels.get(&launch.kernel), "{} {}: {launch:?}", case.name, case.shape);
            left.remove(&launch.kernel);
        }
    }
    assert!(left.is_empty(), "benches/kernels does not measure {left:?}: add a case");
}
