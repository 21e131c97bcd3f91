//! A table of plans: what was chosen for each convolution and each product, on one kind of GPU with libraries of one version.

use crate::device::cuda::blas::ProductChoice;
use crate::device::cuda::dnn::PlanChoice;
use crate::device::cuda::{AlignedProduct, ConvolutionShape};
use serde::{Deserialize, Serialize};
use std::fmt;

/// What plans hold for, and what bits depend on: another GPU or library computes by other means, and in other times.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Card {
    /// `NVIDIA H200`
    pub gpu: String,
    /// Compute capability, major and minor.
    pub capability: (i32, i32),
    /// Version of cuDNN: `9.10.2`.
    pub cudnn: String,
    /// Version of cuBLASLt: `13.0.1`.
    pub cublaslt: String,
}

impl fmt::Display for Card {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Card { gpu, capability: (major, minor), cudnn, cublaslt } = self;
        write!(f, "{gpu} ({major}.{minor}) with cuDNN {cudnn} and cuBLASLt {cublaslt}")
    }
}

/// What a library computes by a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Piece {
    /// cuDNN.
    Convolution(ConvolutionShape),
    /// cuBLASLt.
    Product(AlignedProduct),
}

/// A plan for a piece.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Choice {
    /// Of cuDNN's.
    Convolution(PlanChoice),
    /// Of cuBLASLt's.
    Product(ProductChoice),
}

impl Choice {
    /// What it is for.
    pub fn piece(&self) -> Piece {
        match self {
            Choice::Convolution(choice) => Piece::Convolution(choice.shape),
            Choice::Product(choice) => Piece::Product(choice.product),
        }
    }
}

/// A choice, and what it rests on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimedChoice {
    /// What was chosen.
    pub choice: Choice,
    /// How long it took when plans were compared.
    pub nanoseconds: u64,
}

/// At most one choice for each piece. A cache keeps it, ranks send it to each other, and a checkpoint pins it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlanTable {
    /// What they hold for.
    pub card: Card,
    choices: Vec<TimedChoice>,
}

impl PlanTable {
    /// One without choices.
    pub fn new(card: Card) -> PlanTable {
        PlanTable { card, choices: Vec::new() }
    }

    /// All choices.
    pub fn choices(&self) -> &[TimedChoice] {
        &self.choices
    }

    /// What was chosen for a piece.
    pub fn get(&self, piece: &Piece) -> Option<&TimedChoice> {
        self.choices.iter().find(|timed| timed.choice.piece() == *piece)
    }

    /// Adds a choice, in place of that for the same piece.
    pub fn put(&mut self, timed: TimedChoice) {
        match self.choices.iter_mut().find(|known| known.choice.piece() == timed.choice.piece()) {
            Some(known) => *known = timed,
            None => self.choices.push(timed),
        }
    }

    /// The table as text, a choice a line.
    pub(super) fn encode(&self) -> serde_json::Result<String> {
        let mut text = serde_json::to_string(&self.card)? + "\n";
        for timed in &self.choices {
            text += &(serde_json::to_string(timed)? + "\n");
        }
        Ok(text)
    }

    /// [`PlanTable::encode`]'s table, or what is wrong with the text.
    pub(super) fn decode(text: &[u8]) -> Result<PlanTable, String> {
        let mut lines = text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
        let first = lines.next().ok_or("it is empty")?;
        let mut table = PlanTable::new(serde_json::from_slice(first).map_err(|error| format!("line 1: {error}"))?);
        for (i, line) in lines.enumerate() {
            table.put(serde_json::from_slice(line).map_err(|error| format!("line {}: {error}", i + 2))?);
        }
        Ok(table)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::device::cuda::dnn::{EngineChoice, Form, Knob};
    use crate::device::cuda::{Pass, Precision};

    pub fn card() -> Card {
        Card { gpu: "NVIDIA H200".into(), capability: (9, 0), cudnn: "9.10.2".into(), cublaslt: "13.0.1".into() }
    }

    /// A choice for a convolution of so many images.
    pub fn timed(images: usize, engine: i64) -> TimedChoice {
        let shape = ConvolutionShape {
            pass: Pass::Forward,
            images,
            size: [8, 8],
            channels: 16,
            out: 24,
            filter: 3,
            stride: 1,
            padding: [1, 1],
            precision: Precision::Bf16,
            has_bias: true,
            has_residual: false,
            adds: false,
        };
        let engine = EngineChoice { engine, knobs: vec![Knob { kind: 2, value: 1 }] };
        TimedChoice { choice: Choice::Convolution(PlanChoice { shape, form: Form::Whole, engine }), nanoseconds: 1500 }
    }

    #[test]
    fn a_table_is_written_and_read() {
        let mut table = PlanTable::new(card());
        [timed(1, 4), timed(2, 4), timed(1, 6)].into_iter().for_each(|timed| table.put(timed));
        assert_eq!(table.choices(), [timed(1, 6), timed(2, 4)]);
        assert_eq!(table.get(&timed(2, 0).choice.piece()), Some(&timed(2, 4)));
        assert_eq!(table.get(&timed(3, 0).choice.piece()), None);
        let text = table.encode().unwrap();
        assert_eq!(text.lines().count(), 3);
        assert_eq!(PlanTable::decode(text.as_bytes()).unwrap(), table);
        let json = serde_json::to_value(&table).unwrap();
        assert_eq!(serde_json::from_value::<PlanTable>(json).unwrap(), table);
    }

    #[test]
    fn a_text_that_is_no_table_is_refused() {
        let whole = {
            let mut table = PlanTable::new(card());
            table.put(timed(1, 4));
            table.encode().unwrap()
        };
        for (text, says) in [
            ("", "it is empty"),
            ("\0\0\0", "line 1: "),
            (&whole[1..], "line 1: "),
            (&whole[..whole.len() - 9], "line 2: "),
            (&whole.replace("\"engine\":4", "\"engine\":4e99"), "line 2: "),
            (&whole.replace("Forward", "Sideways"), "line 2: "),
        ] {
            let why = PlanTable::decode(text.as_bytes()).unwrap_err();
            assert!(why.contains(says), "{text}: {why}");
        }
    }
}
