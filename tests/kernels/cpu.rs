//! An op alone, on CPU cores.

use ddpm_dist::collective::Solo;
use ddpm_dist::device::{Binding, Device, Region, cpu::Cpu};
use ddpm_dist::tape::{Op, Spec, Tape, Var, plan};
use std::sync::Arc;

/// Runs `op` on these inputs; gives its outputs, of which the first `updated.len()` are updated in place.
#[allow(dead_code, reason = "a test program needs one of them")]
pub fn on_cpu(op: impl Op, inputs: &[Vec<u8>], updated: &[Vec<u8>]) -> Vec<Vec<u8>> {
    on_cpu_from(Arc::new(op), inputs, updated, (1 << updated.len()) - 1)
}

/// Runs `op` on these inputs and on outputs that hold `before`, or NaN where that says nothing; gives its outputs. `updates` as in
/// [`Tape::push_into`].
pub fn on_cpu_from(op: Arc<dyn Op>, inputs: &[Vec<u8>], before: &[Vec<u8>], updates: u32) -> Vec<Vec<u8>> {
    let mut tape = Tape::new();
    let signature = op.signature();
    let mut io = |kind: &str, specs: &[Spec], contents: &[Vec<u8>]| -> Vec<Var> {
        let spec_of = |(i, spec): (usize, &Spec)| match spec.shape {
            Some(_) => spec.clone(),
            // A flat buffer, as long as it is given.
            None => {
                let elements = contents[i].len() / spec.dtype(tape.precision()).size();
                Spec { shape: Some([elements].into()), ..spec.clone() }
            }
        };
        let specs: Vec<Spec> = specs.iter().enumerate().map(spec_of).collect();
        specs.into_iter().enumerate().map(|(i, spec)| tape.io(&format!("{kind} {i}"), spec)).collect()
    };
    let ins = io("input", &signature.inputs, inputs);
    let outs = io("output", &signature.outputs, before);
    tape.push_into(op, &ins, &outs, updates);
    let program = Arc::new(plan(&tape, None, None));
    let mut device = Device::Cpu(Cpu::new(2));
    let [buffer, arena] = [program.io_bytes, program.arena_bytes].map(|bytes| device.allocate(bytes).unwrap());
    device.upload(buffer, 0, &vec![0xFFu8; program.io_bytes]).unwrap();
    for (kind, contents) in [("input", inputs), ("output", before)] {
        for (i, content) in contents.iter().enumerate() {
            let slot = program.io(&format!("{kind} {i}"));
            assert_eq!(slot.bytes(), content.len(), "{kind} {i}");
            device.upload(buffer, slot.offset, content).unwrap();
        }
    }
    let binding = Binding::default().with(Region::Io, buffer).with(Region::Arena, arena);
    program.load(&mut device, binding).unwrap().run(&mut device, &mut Solo).unwrap();
    let read = |i: usize| {
        let slot = program.io(&format!("output {i}"));
        let mut content = vec![0u8; slot.bytes()];
        device.download(buffer, slot.offset, &mut content).unwrap();
        content
    };
    (0..signature.outputs.len()).map(read).collect()
}
