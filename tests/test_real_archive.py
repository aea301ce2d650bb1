"""Every file of the shared real scans with its verdict, and why; what is one scan in several formats is one volume and found to be."""

from collections import defaultdict

import numpy as np
import pytest
from pydicom.uid import JPEG2000Lossless, JPEGLosslessSV1, JPEGLSLossless, RLELossless

from volssl import archive, index
from volssl.archive import header_or_code
from volssl.dicom import header
from volssl.files import read_csv
from volssl.pixels import read_series

# Folder or file -> modality, verdict, reason codes; a folder with a DICOM series counts as one. Words after # say why.
ACCEPT, LABELS = ("accept", ""), ("", "reject", "label_map")
THIN = ("MR", "reject", "too_few_slices")  # 2 or 4 slices
DERIVED = "other/derived_formats/"
DICOM2NIFTI = "other/dicom2nifti/"
TABLE = {
    "abdomen_ct/KiTS-00072_dicom": ("CT", *ACCEPT),
    "abdomen_ct/TotalSegmentator_example/example_ct.nii.gz": ("CT", *ACCEPT),
    "abdomen_ct/TotalSegmentator_example/example_ct_sm.nii.gz": ("CT", *ACCEPT),  # its origin is wrong, which no file can tell
    "abdomen_ct/TotalSegmentator_example/example_mr_sm.nii.gz": ("MR", *ACCEPT),
    "abdomen_ct/TotalSegmentator_example/example_seg.nii.gz": LABELS,
    "abdomen_ct/TotalSegmentator_example/example_seg_fast_force_split.nii.gz": LABELS,
    "abdomen_ct/TotalSegmentator_example/example_seg_mr.nii.gz": LABELS,
    "abdomen_ct/TotalSegmentator_example_ct_dicom": ("CT", *ACCEPT),  # JPEG 2000, no series UID: the folder stands for it
    "abdomen_ct/TotalSegmentator_example_ct_dicom_seg/example_seg_dicom.nii.gz": LABELS,
    "brain_mr/mni152/mni_icbm152_t1_2009a.nii.gz": ("MR", *ACCEPT),
    **{f"brain_mr/open_ms_data/patient19/{name}.nii.gz": ("MR", *ACCEPT) for name in ("FLAIR", "T1", "T1POST", "T2")},
    "brain_mr/open_ms_data/patient19/lesion_gt.nii.gz": LABELS,
    "brain_mr/studyforrest_T1w_dicom": ("MR", "accept", "derived"),  # DERIVED, since it was defaced; oblique, implicit VR
    **{f"brain_mr_tumour/TCGA-DU-7294/brats_space/TCGA-DU-7294_{name}.nii.gz": ("MR", *ACCEPT) for name in ("fla", "t1", "t1c", "t2")},
    "brain_mr_tumour/TCGA-DU-7294/brats_space/seg_auto_fusion_mav.nii.gz": LABELS,
    "brain_mr_tumour/pyradiomics/brain1_image.nrrd": ("MR", *ACCEPT),
    "brain_mr_tumour/pyradiomics/brain1_label.nrrd": LABELS,
    "chest_ct/LIDC-IDRI-0314_luna16_style_crop/1.3.6.1.4.1.14519.5.2.1.6279.6001.154677396354641150280013275227.mhd": ("CT", *ACCEPT),
    "chest_ct/LIDC-IDRI-0314_luna16_style_crop/1.3.6.1.4.1.14519.5.2.1.6279.6001.154677396354641150280013275227_nodule.nii.gz": LABELS,
    "chest_ct/TotalSegmentator_pulmonary/ct_cropped.nii.gz": ("CT", *ACCEPT),
    "chest_ct/TotalSegmentator_pulmonary/pulmonary_artery.nii.gz": LABELS,
    "chest_ct/pyradiomics/lung1_image.nrrd": ("CT", *ACCEPT),
    "chest_ct/pyradiomics/lung1_label.nrrd": LABELS,
    **{
        DERIVED + name: ("CT", *ACCEPT)
        for name in (
            "ct_4d_singleton.nii.gz ct_int32.nii.gz ct_mha.mha ct_mhd_raw.mhd ct_mhd_zraw.mhd ct_nhdr.nhdr ct_nrrd_gzip.nrrd ct_pair.hdr "
            "ct_qform_only.nii.gz ct_reoriented_LPI.nii.gz ct_reoriented_PIR.nii.gz ct_sform_only.nii.gz"
        ).split()
    },
    DERIVED + "ct_single_slice.nii.gz": ("CT", "reject", "too_few_slices"),
    **{DERIVED + f"label_{name}.nii.gz": LABELS for name in ("liver_0_255", "liver_float32", "liver_uint8", "wrong_shape")},
    DICOM2NIFTI + "failing/gantrytilting/001": ("CT", "reject", "gantry_tilt;too_few_slices"),  # 4 slices
    # With `generic/anatomical/001`, which holds the same series of 4 slices whole; of equal slices one is kept.
    DICOM2NIFTI + "failing/slicecount/001": ("MR", "reject", "duplicate_position;too_few_slices"),
    DICOM2NIFTI + "generic/anatomical/001_implicit": THIN,
    DICOM2NIFTI + "generic/anatomical/002_non_isotropic": ("MR", "reject", "computed;too_few_slices"),  # a projection, says ImageType
    DICOM2NIFTI + "generic/compressed/001": ("MR", "reject", "duplicate_position;too_few_slices"),  # one series in five syntaxes
    DICOM2NIFTI + "generic/rgb/001": ("MR", "reject", "rgb;secondary_capture;too_few_slices"),
    **{
        DICOM2NIFTI + f"{name}_ground_truth{turned}.nii.gz": THIN
        for name in (
            "failing/slicecount/001 generic/anatomical/001 generic/anatomical/001_implicit generic/anatomical/002_non_isotropic "
            "generic/compressed/001 generic/compressed_j2k/001 generic/compressed_jpeg/001 generic/compressed_jpegls/001 "
            "generic/compressed_rle/001"
        ).split()
        for turned in ("", "_reoriented")
    },
    DICOM2NIFTI + "generic/rgb/001_ground_truth.nii.gz": ("", "reject", "rgb"),
    DICOM2NIFTI + "generic/rgb/001_ground_truth_reoriented.nii.gz": ("", "reject", "rgb"),
    "other/nibabel/anatomical.nii": ("", "reject", "unknown_modality"),  # values from -32768 on
    "other/nibabel/example4d.nii.gz": ("MR", "repair", "several_volumes"),
    "other/nibabel/example_nifti2.nii.gz": ("MR", "repair", "several_volumes"),
    "other/nibabel/functional.nii": ("MR", "reject", "several_volumes;too_few_slices"),  # 20 time points of 3 slices
    "other/nibabel/reoriented_anat_moved.nii": ("MR", *ACCEPT),
    "other/pydicom/693_J2KI.dcm": ("CT", "reject", "derived;too_few_slices"),
    "other/pydicom/CT_small.dcm": ("CT", "reject", "too_few_slices"),
    "other/pydicom/ExplVR_BigEnd.dcm": ("OTHER", "reject", "no_geometry;rgb;unsupported_modality"),  # ultrasound
    "other/pydicom/J2K_pixelrep_mismatch.dcm": ("CT", "reject", "too_few_slices"),
    "other/pydicom/JPEG-lossy.dcm": ("OTHER", "reject", "no_geometry;secondary_capture;unsupported_modality"),  # with JPEG2000, JPGExtended
    # One image in nine syntaxes and states under one UID; the truncated one differs from the others.
    "other/pydicom/MR_small.dcm": ("MR", "reject", "derived;duplicate_position;duplicates_differ;truncated"),
    "other/pydicom/image_dfl.dcm": ("OTHER", "reject", "no_geometry;secondary_capture;unsupported_modality"),
    "other/pydicom/liver_1frame.dcm": ("OTHER", "reject", "derived;no_geometry;not_an_image"),  # SEG
    "other/pydicom/rtdose.dcm": ("OTHER", "reject", "multi_frame;no_geometry;not_an_image"),
    "other/pydicom/rtstruct.dcm": ("OTHER", "reject", "no_geometry;not_an_image"),  # without preamble
    "other/pydicom/test-SR.dcm": ("OTHER", "reject", "no_geometry;not_an_image"),
}
UNREADABLE = {
    DERIVED + "empty.nii.gz": "empty_file",
    **{
        "other/nibabel/" + name: "unsupported_format"
        for name in "minc2_1_scale.mnc phantom_EPI_asc_CLEAR_2_1.PAR phantom_EPI_asc_CLEAR_2_1.REC scaled+tlrc.BRIK scaled+tlrc.HEAD "
        "small.mnc test.mgz".split()
    },
    "other/pydicom/no_meta.dcm": "unsupported_format",  # a stray byte, then a data set: neither mark nor a first element
    "other/pydicom/meta_missing_tsyntax.dcm": "undecodable",  # a fragment
}
IGNORED = {".img", ".raw", ".zraw", ".csv", ".json", ".md", ".txt", ".PDDL", ""}  # pixels beside their header; papers
ONE_SCAN = [name for name in TABLE if name.startswith(DERIVED + "ct_") and "single_slice" not in name]


@pytest.fixture(scope="module")
def indexed(real_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("real") / "index"
    index.build([real_data], out=out, gates=index.Gates(thumbnails=False, validation_share=0.3))
    return real_data, out, index.load(out)


def named(folder, path):
    inside = path.relative_to(folder).as_posix()
    parts = [inside, *(parent.as_posix() for parent in path.relative_to(folder).parents)]
    return next((part for part in parts if part in TABLE or part in UNREADABLE), inside)


@pytest.mark.slow
def test_every_file_has_its_verdict(indexed):
    folder, out, loaded = indexed
    found = defaultdict(set)
    for row in loaded.rows:
        source = loaded.sources[row.scan_id]
        name = min(named(folder, path) for path in source.files)
        if not name.startswith("brain_mr/Task04_Hippocampus/"):
            found[name].add((row.modality, row.verdict, ";".join(row.reasons)))
        else:
            assert (row.modality, row.verdict) == (("MR", "accept") if "imagesTr" in name else ("", "reject")), name
    assert {name: verdicts for name, verdicts in found.items() if verdicts != {TABLE.get(name)}} == {}
    assert set(TABLE) - set(found) == set()
    aside = {named(folder, folder / row["path"]): row["reason"] for row in read_csv(out / "private/files.csv") if row["file_id"]}
    assert aside == UNREADABLE
    ignored = [folder / row["path"] for row in read_csv(out / "private/files.csv") if not row["file_id"]]
    files = {path for path in folder.rglob("*") if path.is_file()}
    known = {path for source in loaded.sources.values() for path in source.files} | {folder / name for name in UNREADABLE}
    assert not known & set(ignored)
    # What is in no row, nor aside, is the same instance once more.
    instances = {one.instance for path in known if (one := header_or_code(path)) and not isinstance(one, str)}
    assert {header_or_code(path).instance for path in files - known - set(ignored)} <= instances
    assert {path.suffix for path in ignored} == IGNORED


@pytest.mark.slow
def test_derived_formats_are_found_to_be_one_scan_on_one_side(indexed):
    folder, _, loaded = indexed
    twins = [*ONE_SCAN, "abdomen_ct/TotalSegmentator_example/example_ct_sm.nii.gz"]
    rows = {named(folder, loaded.sources[row.scan_id].files[0]): row for row in loaded.rows}
    assert len({rows[name].content_hash for name in twins}) == 1
    assert len({rows[name].split for name in twins}) == 1
    assert len({row.content_hash for row in rows.values() if row.usable}) == sum(row.usable for row in rows.values()) - len(twins) + 1
    channels = {rows[f"brain_mr/open_ms_data/patient19/{name}.nii.gz"].split for name in ("FLAIR", "T1", "T1POST", "T2")}
    assert len(channels) == 1


@pytest.mark.parametrize("name", ONE_SCAN)
def test_derived_formats_are_one_volume(real_data, name):
    reference = archive.read_image(real_data / DERIVED / "ct_mha.mha").reoriented("RAS")
    volume = archive.read_image(real_data / name).reoriented("RAS")
    assert volume.grid.almost_equal(reference.grid, tolerance_mm=1e-2)
    np.testing.assert_array_equal(volume.array_CXYZ, reference.array_CXYZ)


def test_one_series_in_five_syntaxes_has_identical_voxels(real_data):
    """Deflation apart, what hospitals compress with: JPEG 2000, JPEG lossless, JPEG-LS, RLE; and not compressed."""
    stacks = {}
    for name in ("compressed", "compressed_j2k", "compressed_jpeg", "compressed_jpegls", "compressed_rle"):
        slices = [header(path) for path in sorted((real_data / DICOM2NIFTI / "generic" / name / "001").iterdir())]
        stacks[slices[0].pixels.syntax] = read_series(slices).array_CXYZ
    assert set(stacks) >= {JPEG2000Lossless, JPEGLosslessSV1, JPEGLSLossless, RLELossless}
    first, *others = stacks.values()
    for other in others:
        np.testing.assert_array_equal(other, first)
