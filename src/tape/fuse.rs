//! Rewrites of the tape that every device profits from.

use super::Tape;
use super::record::Home;
use std::sync::Arc;

impl Tape {
    /// Lets ops that can add a residual to their output do so in place of a separate addition.
    ///
    /// An op takes over the addition `y + r` if nothing else reads y, nor the host. It then stands where the addition stood, after everything r needs.
    pub fn fuse_residuals(&mut self, is_addition: impl Fn(&str) -> bool) {
        let mut uses = vec![0usize; self.values.len()];
        let mut producer = vec![None; self.values.len()];
        for (id, node) in self.nodes.iter().enumerate() {
            node.inputs.iter().for_each(|v| uses[v.index()] += 1);
            node.outputs.iter().for_each(|v| producer[v.index()] = Some(id));
        }
        let mut absorbed = vec![false; self.nodes.len()];
        for id in 0..self.nodes.len() {
            if !is_addition(self.nodes[id].op.name()) {
                continue;
            }
            let [a, b] = self.nodes[id].inputs[..] else { continue };
            for (y, residual) in [(b, a), (a, b)] {
                let Some(source) = producer[y.index()] else { continue };
                let is_seen = uses[y.index()] != 1 || self.values[y.index()].home != Home::Arena;
                if is_seen || absorbed[source] || self.nodes[source].outputs.len() != 1 {
                    continue;
                }
                let Some(op) = self.nodes[source].op.with_residual() else { continue };
                let mut node = self.nodes[source].clone();
                node.op = Arc::from(op);
                node.inputs.push(residual);
                node.outputs = self.nodes[id].outputs.clone();
                self.nodes[id] = node;
                absorbed[source] = true;
                break;
            }
        }
        let mut keep = absorbed.iter().map(|gone| !gone);
        self.nodes.retain(|_| keep.next().unwrap_or(true));
    }
}
