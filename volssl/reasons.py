"""Every reason code in plain words: what it means and what to do. Codes stand in index.csv, failures.csv and summary.json."""

from __future__ import annotations

# code -> (what it means, what to do)
REASONS: dict[str, tuple[str, str]] = {
    # of a stack of slices
    "missing_slice": (
        "Between two neighbouring slices lies a gap of one and a half usual steps or more.",
        "Export the series again from the PACS; most often the transfer was cut off.",
    ),
    "duplicate_position": (
        "Two slices lie at one place.",
        "Equal copies are dropped. If they differ, the series holds several scans: export it again by acquisition.",
    ),
    "duplicates_differ": (
        "Two slices lie at one place and show different pixels, and nothing in their headers tells them apart.",
        "Export the acquisitions (time points, echoes, reconstructions) as series of their own.",
    ),
    "uneven_gap": ("The distance between slices varies.", "Nothing: the volume is resampled from the true positions."),
    "shifted_slice": ("Slices are shifted sideways against each other.", "Nothing: the volume is resampled from the true positions."),
    "gantry_tilt": ("The gantry was tilted: the stack leans against its slices.", "Nothing: the volume is sheared back upright."),
    "mixed_size": ("Slices of several sizes share one series.", "Nothing: each size becomes a volume of its own."),
    "mixed_spacing": ("Slices of several pixel sizes share one series.", "Nothing: each becomes a volume of its own."),
    "mixed_orientation": ("Slices of several orientations share one series.", "Nothing: each orientation becomes a volume of its own."),
    "mixed_kernel": ("Slices of several reconstruction kernels share one series.", "Nothing: each kernel becomes a volume of its own."),
    "mixed_modality": ("Images of several modalities share one series.", "Nothing: each becomes a volume of its own."),
    "too_few_slices": ("The stack is too thin to learn from.", "Nothing, or lower the least number of slices (min_slices)."),
    "multi_frame": (
        "One file holds several frames.",
        "Nothing where each frame is placed: it is read frame by frame. Otherwise export the series as single images.",
    ),
    "several_volumes": (
        "The series or file holds several volumes, such as time points or echoes.",
        "Nothing where they can be told apart: each becomes a volume of its own.",
    ),
    "no_geometry": (
        "Where the slices lie in the patient is not said, or makes no sense.",
        "Export from the source; screenshots and exports lose it.",
    ),
    "no_orientation": ("The file does not say which side is left.", "Convert it again from the DICOM source."),
    "sheared": ("The axes of the voxel grid do not stand at right angles.", "Resample it with a tool that you trust."),
    "not_one_series": ("The folder holds several series.", "Name one of its files."),
    # of what the images are
    "not_an_image": ("No image, but a report, a segmentation, a plan, a dose or another kind of file.", "Nothing."),
    "unsupported_modality": ("Neither CT nor MR nor PT.", "Nothing: these are not learnt from."),
    "rgb": ("Colour pictures.", "Nothing: most are screenshots or fused views."),
    "inverted_or_palette": ("Grey values are inverted or stand for colours of a palette.", "Export the original series."),
    "localiser": ("A scout view for planning.", "Nothing."),
    "derived": ("The header calls the images derived.", "Nothing: it is only noted."),
    "secondary": ("A secondary image, made from others.", "Export the original series."),
    "secondary_capture": ("A screenshot or scanned document.", "Nothing."),
    "computed": ("Computed from other images: a projection, a map, a reformat.", "Nothing, or take the series that it was made from."),
    "burned_in_annotation": (
        "The header says that text is burned into the pixels: perhaps a name.",
        "Do not use it. It is not shown here.",
    ),
    "not_hu": ("A CT whose values cannot be turned into Hounsfield units.", "Export the original series."),
    "modality_mismatch": ("The values do not fit the modality that the header names.", "Look at it; correct the header or leave it out."),
    "label_map": ("The values look like labels, not like an image.", "Nothing: keep labels in a labelled data set instead."),
    "unknown_modality": ("The values look like neither CT nor MR.", "Say what these files are (modality)."),
    "constant": ("All voxels have one value.", "Nothing."),
    "not_3d": ("The file has fewer or more than three axes.", "Export volumes."),
    "not_numbers": ("The voxels are no real numbers.", "Convert the file."),
    "not_finite": ("Some voxels are not a number (NaN) or infinite.", "Find what wrote them, and convert the file again."),
    # of files that cannot be read
    "truncated": ("The file or its pixels end early.", "Copy or export it again."),
    "undecodable": ("The file is damaged, or coded in a way that is not known.", "Export it again; try the extra volssl[gdcm]."),
    "empty_file": ("The file has no content.", "Copy it again."),
    "no_permission": ("You may not read the file.", "Ask for read access and run index again."),
    "missing": ("The file was there when it was listed, but not when it was read.", "Run index again when nothing writes to the archive."),
    "too_large": ("The file says that it is larger than any scan.", "Check the file: its header is damaged or hostile."),
    "out_of_memory": ("Reading needs more memory than there is.", "Run it on a larger machine."),
    "unsupported_format": ("A format that volssl does not read.", "Convert it to NIfTI or unpack it."),
    "wrong_syntax": ("The header names a compression that the pixels do not have.", "Export the series again."),
    "packed_archive": ("A zip or tar file; what is in it is not looked at.", "Unpack it beside the others."),
    "unreadable_folder": ("A folder cannot be entered: its path is too long, or the disk fails.", "Shorten the path, or copy it again."),
    "companion": ("The pixels of a header file beside it; read together with it.", "Nothing."),
    # of prepare
    "other_modality": ("Of another modality than the recipe prepares.", "Prepare it into another store with a fitting recipe."),
    "no_body": ("Nothing is brighter than air.", "Look at it; lower body.threshold if it shows a patient."),
    "no_contrast": ("The body has one value only.", "Look at it."),
    "timeout": ("It took longer than a series may take.", "Prepare it again with more time."),
    "unexpected_error": ("Something that volssl does not foresee; the log names the place.", "Please report the log's line."),
    "worker_killed": ("The process that read it died twice.", "Look at its size; give it more memory."),
}
UNKNOWN = ("A code that this page does not know.", "See docs/index.md.")


def explained(code: str) -> tuple[str, str]:
    """What a reason code means, and what to do."""
    return REASONS.get(code, UNKNOWN)
