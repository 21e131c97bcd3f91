//! cuDNN's engines for a graph: which there are, which may be used, and the plans that they make.

use super::Handle;
use super::descriptor::{BehaviorNote, Descriptor, KnobType, NumericalNote};
use super::graph::Graph;
use super::library::{Library, Refusal};
use crate::device::cuda::Precision;
use cudarc::cudnn::sys::cudnnBackendAttributeName_t as Name;
use cudarc::cudnn::sys::cudnnBackendDescriptorType_t as Kind;
use cudarc::cudnn::sys::cudnnBackendHeurMode_t as Mode;
use cudarc::cudnn::sys::cudnnBackendNumericalNote_t as Note;
use serde::{Deserialize, Serialize};

/// A setting of an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Knob {
    /// `cudnnBackendKnobType_t`
    pub kind: u32,
    /// Its value.
    pub value: i64,
}

/// An engine and its settings.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct EngineChoice {
    /// The engine's global index.
    pub engine: i64,
    /// In the library's order.
    pub knobs: Vec<Knob>,
}

/// What an engine that cuDNN proposes says of itself.
#[derive(Clone, Debug)]
pub struct EngineNotes {
    /// The engine's global index.
    pub engine: i64,
    /// `cudnnBackendNumericalNote_t`
    pub numerical: Vec<u32>,
    /// `cudnnBackendBehaviorNote_t`
    pub behavior: Vec<u32>,
    /// Why it is not used, if it is not for what it says.
    pub fault: Option<&'static str>,
}

/// An engine configuration; no plan yet.
#[derive(Debug)]
pub(super) struct Config {
    /// First, so that it goes before what it is made of.
    config: Descriptor,
    _parts: Vec<Descriptor>,
    engine: Descriptor,
    pub choice: EngineChoice,
    notes: Vec<u32>,
}

/// A plan that is finalized, with what it is made of.
#[derive(Debug)]
pub(super) struct EnginePlan {
    /// First, so that it goes before what it is made of.
    pub plan: Descriptor,
    pub config: Config,
    /// Bytes.
    pub workspace: usize,
}

/// More knobs or notes than an engine has: there are fewer kinds of them in all.
const MOST: usize = 64;

/// What is asked for engines, in this order: the second takes longer and knows more, the third knows those that work wherever others do not.
pub(super) const MODES: [Mode; 3] = [Mode::CUDNN_HEUR_MODE_A, Mode::CUDNN_HEUR_MODE_B, Mode::CUDNN_HEUR_MODE_FALLBACK];

/// The configurations that cuDNN proposes for a graph, best first by its own guess.
///
/// # Errors
/// cuDNN's, which may be that it has none.
pub(super) fn proposed(library: &'static Library, graph: &Graph, mode: Mode) -> Result<Vec<Config>, Refusal> {
    let heuristics = Descriptor::new(library, Kind::CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR)?
        .with_descriptors(Name::CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, &[&graph.graph])?
        .with(Name::CUDNN_ATTR_ENGINEHEUR_MODE, &[mode])?
        .finalized()?;
    let kind = Kind::CUDNN_BACKEND_ENGINECFG_DESCRIPTOR;
    let name = Name::CUDNN_ATTR_ENGINEHEUR_RESULTS;
    let configs = heuristics.descriptors(name, kind, heuristics.count(name)?)?;
    configs.into_iter().map(Config::read).collect()
}

impl Config {
    /// One that the library has filled.
    fn read(config: Descriptor) -> Result<Config, Refusal> {
        let engine = config.descriptor(Name::CUDNN_ATTR_ENGINECFG_ENGINE, Kind::CUDNN_BACKEND_ENGINE_DESCRIPTOR)?;
        let kind = Kind::CUDNN_BACKEND_KNOB_CHOICE_DESCRIPTOR;
        let parts = config.descriptors(Name::CUDNN_ATTR_ENGINECFG_KNOB_CHOICES, kind, MOST)?;
        let knob = |knob: &Descriptor| -> Result<Knob, Refusal> {
            let KnobType(kind) = knob.value(Name::CUDNN_ATTR_KNOB_CHOICE_KNOB_TYPE)?;
            Ok(Knob { kind, value: knob.value(Name::CUDNN_ATTR_KNOB_CHOICE_KNOB_VALUE)? })
        };
        let knobs = parts.iter().map(knob).collect::<Result<Vec<Knob>, Refusal>>()?;
        let choice = EngineChoice { engine: engine.value(Name::CUDNN_ATTR_ENGINE_GLOBAL_INDEX)?, knobs };
        let notes = notes(&engine)?;
        Ok(Config { config, _parts: parts, engine, choice, notes })
    }

    /// One that has been chosen before.
    pub fn chosen(library: &'static Library, graph: &Graph, choice: &EngineChoice) -> Result<Config, Refusal> {
        let engine = Descriptor::new(library, Kind::CUDNN_BACKEND_ENGINE_DESCRIPTOR)?
            .with_descriptors(Name::CUDNN_ATTR_ENGINE_OPERATION_GRAPH, &[&graph.graph])?
            .with(Name::CUDNN_ATTR_ENGINE_GLOBAL_INDEX, &[choice.engine])?
            .finalized()?;
        let notes = notes(&engine)?;
        let knob = |knob: &Knob| {
            Descriptor::new(library, Kind::CUDNN_BACKEND_KNOB_CHOICE_DESCRIPTOR)?
                .with(Name::CUDNN_ATTR_KNOB_CHOICE_KNOB_TYPE, &[KnobType(knob.kind)])?
                .with(Name::CUDNN_ATTR_KNOB_CHOICE_KNOB_VALUE, &[knob.value])?
                .finalized()
        };
        let parts = choice.knobs.iter().map(knob).collect::<Result<Vec<Descriptor>, Refusal>>()?;
        let mut config = Descriptor::new(library, Kind::CUDNN_BACKEND_ENGINECFG_DESCRIPTOR)?
            .with_descriptors(Name::CUDNN_ATTR_ENGINECFG_ENGINE, &[&engine])?;
        if !parts.is_empty() {
            let knobs: Vec<&Descriptor> = parts.iter().collect();
            config = config.with_descriptors(Name::CUDNN_ATTR_ENGINECFG_KNOB_CHOICES, &knobs)?;
        }
        let config = config.finalized()?;
        Ok(Config { config, _parts: parts, engine, choice: choice.clone(), notes })
    }

    /// Why it may not be used for activations of a type, by what its engine says of itself.
    pub fn fault(&self, precision: Precision) -> Option<&'static str> {
        const NEVER: [(Note, &str); 7] = [
            (Note::CUDNN_NUMERICAL_NOTE_NONDETERMINISTIC, "it gives other bits each time"),
            (Note::CUDNN_NUMERICAL_NOTE_WINOGRAD, "it is Winograd's"),
            (Note::CUDNN_NUMERICAL_NOTE_WINOGRAD_TILE_4x4, "it is Winograd's"),
            (Note::CUDNN_NUMERICAL_NOTE_WINOGRAD_TILE_6x6, "it is Winograd's"),
            (Note::CUDNN_NUMERICAL_NOTE_WINOGRAD_TILE_13x13, "it is Winograd's"),
            (Note::CUDNN_NUMERICAL_NOTE_FFT, "it is a Fourier transform"),
            (Note::CUDNN_NUMERICAL_NOTE_REDUCED_PRECISION_REDUCTION, "its sums are not f32"),
        ];
        const IN_F32: [(Note, &str); 2] = [
            (Note::CUDNN_NUMERICAL_NOTE_DOWN_CONVERT_INPUTS, "it rounds f32"),
            (Note::CUDNN_NUMERICAL_NOTE_TENSOR_CORE, "it rounds f32 for tensor cores"),
        ];
        let in_f32: &[(Note, &str)] = if precision == Precision::F32 { &IN_F32 } else { &[] };
        let mut faults = NEVER.iter().chain(in_f32);
        faults.find(|(note, _)| self.notes.contains(&(*note as u32))).map(|(_, why)| *why)
    }

    /// What its engine says of itself.
    pub fn engine_notes(&self, precision: Precision) -> Result<EngineNotes, Refusal> {
        let behavior: Vec<BehaviorNote> = self.engine.values(Name::CUDNN_ATTR_ENGINE_BEHAVIOR_NOTE, MOST)?;
        Ok(EngineNotes {
            engine: self.choice.engine,
            numerical: self.notes.clone(),
            behavior: behavior.into_iter().map(|BehaviorNote(note)| note).collect(),
            fault: self.fault(precision),
        })
    }

    /// The plan that it makes.
    pub fn plan(self, handle: &Handle) -> Result<EnginePlan, Refusal> {
        let plan = Descriptor::new(handle.library, Kind::CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR)?
            .with(Name::CUDNN_ATTR_EXECUTION_PLAN_HANDLE, &[handle.raw])?
            .with_descriptors(Name::CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, &[&self.config])?
            .finalized()?;
        let workspace: i64 = plan.value(Name::CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE)?;
        Ok(EnginePlan { plan, config: self, workspace: usize::try_from(workspace).unwrap_or(usize::MAX) })
    }
}

fn notes(engine: &Descriptor) -> Result<Vec<u32>, Refusal> {
    let notes: Vec<NumericalNote> = engine.values(Name::CUDNN_ATTR_ENGINE_NUMERICAL_NOTE, MOST)?;
    Ok(notes.into_iter().map(|NumericalNote(note)| note).collect())
}
